"""Coding: from images to files and back, with the same bits on every machine."""
