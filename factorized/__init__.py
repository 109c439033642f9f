"""Factorized-prior image compression (Balle et al., ICLR 2017 and 2018)."""
