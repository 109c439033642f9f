"""Evaluation: measuring codecs on images, and comparing the results."""
