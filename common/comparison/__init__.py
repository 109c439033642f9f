"""Comparison of all papers, classical codecs and published curves: table, plot and page."""
