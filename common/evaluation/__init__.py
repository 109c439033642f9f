"""Evaluation: measure codecs on images and compare the results."""
