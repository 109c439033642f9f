"""Recipes: training, exporting and publishing the weights that a paper's folder bundles."""
