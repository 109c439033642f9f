"""Scale-hyperprior image compression (Balle et al., ICLR 2018)."""
