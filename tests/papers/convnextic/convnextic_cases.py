"""Small networks and flags that the tests of ConvNeXTIC share."""

from pathlib import Path

import torch

from convnextic.model import build
from convnextic.variants import VARIANTS

ROOT = Path(__file__).parents[3]
ABLATIONS = [  # option, value: each beside v1_patch
    ("resample_norm", "layernorm"), ("block_norm", "gdn"), ("block_norm", "batchnorm"),
    ("block_norm", "none"), ("depths", (3, 3, 9, 3, 3, 3)), ("decoder_dw", "convtranspose"),
    ("kernel_size", 5), ("kernel_size", (7, 5)), ("dw_groups", 4), ("drop_path_rate", 0.1),
    ("mlp_ratio", 2), ("resample", "k3s2"), ("stem", "k2s2"), ("stem", "k5s2"),
    ("context", "scctx"), ("external_attention", True), ("variable_rate", True),
    ("layer_scale_init", 0.1)]
CASES = [(variant, {}) for variant in VARIANTS] + [("v1_patch", dict([a])) for a in ABLATIONS]


def lively(variant, seed=0, **options):
    """A small network whose blocks do something and whose latents are not all zero."""
    torch.manual_seed(seed)
    merged = VARIANTS[variant] | options
    options.setdefault("layer_scale_init", 0.5)
    model = build(variant, 8, 24 if merged["context"] == "scctx" else 12, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith(("g_a.3.down", "h_a.1.down")) and p.dim() == 4:
                p.mul_(6)
    model.update(force=True)
    return model.eval()


def rate_of(model):
    return {"lmbda": 0.02} if model.variable_rate else {}


TINY = ("--embed_dim 4 --latent_dim 6 --patchsize 128 --batchsize 2 --steps-per-epoch 3 --epochs 2 "
        "--worker_num 0 --batchsize_test 8 --precision fp32 --quality_level 3 --seed 1").split()
