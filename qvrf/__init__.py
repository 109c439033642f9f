"""QVRF: one model, every rate."""
