"""Checkerboard context model (He et al., CVPR 2021)."""
