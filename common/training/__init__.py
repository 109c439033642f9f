"""Training: the parts of a run that are the same in all papers."""
