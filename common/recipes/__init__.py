"""Recipes: train, export and publish the bundled weights of a paper."""
