"""Training: the parts of a run that no paper should write twice."""
