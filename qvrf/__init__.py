"""QVRF: a variable-rate framework for image compression (Tong et al., ICIP 2023)."""
