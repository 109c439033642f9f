"""Small networks, an image and flags that the tests of TBTC share."""

from pathlib import Path

from common import data

import torch

from tbtc.model import ZOO, ZYC2022
from tbtc.tcm import TCM

ROOT = Path(__file__).parents[3]
SWIN, CONV = (32, 32, 64, 64, 32, 32), (64, 32)


def tiny(name, seed=0):
    """A small model with latents that are not all zero and scales that cover them."""
    torch.manual_seed(seed)
    if name == "tcm":
        model = TCM(32, 40, 16)
        last = model.g_a[-1]
    else:
        transform, prior = ZOO[name]
        model = ZYC2022(transform, prior, CONV if transform == "conv" else SWIN)
        last = model.g_a[-1] if transform == "conv" else model.g_a.layers[3].blocks[1].mlp.fc2
    with torch.no_grad():
        last.weight.mul_(8 / model.eval().g_a(photograph()).std())
        if name == "tcm":
            for net in model.cc_scale_transforms:
                net[-1].bias.add_(12)
        elif model.charm:
            for net in model.charm_scale_transforms:
                net.layers[-1].bias.add_(12)
    model.update(force=True)
    return model.eval()


def photograph(height=128, width=192):
    image = data.to_float(data.read_image(data.KODAK / "kodim23.png"))
    return image[None, :, 100 : 100 + height, 200 : 200 + width]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


TINY = ("--quality XS --train_batch_size 2 --train_patch_size 64 --valid_patch_size 64 "
        "--steps-per-epoch 3 --num_epochs 2 --num_workers 0 --validation_cadence 1 --seed 1 "
        "--precision fp32 --lmbda 0.0067").split()
