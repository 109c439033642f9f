"""Joint autoregressive and hierarchical priors (Minnen et al., NeurIPS 2018)."""
