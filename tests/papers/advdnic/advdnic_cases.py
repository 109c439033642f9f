"""Small networks and an image that the tests of advDNIC share."""

from pathlib import Path

from common import data

import torch
from torch import nn

from advdnic.model import build

ROOT = Path(__file__).parents[3]
CONTEXTS = ("variant3", "variant3_old", "variant4")
SIZES = [(64, 64), (65, 97), (128, 192)]


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def tiny(experiment, seed=0, **options):
    """A small model with latents that are not all zero and scales that cover them."""
    torch.manual_seed(seed)
    model = build(experiment, 128 if experiment == "variant4" else 16, **options).eval()
    x = photograph()
    with torch.no_grad():
        for module in model.modules():  # batch norm as after some training
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)
                module.running_mean.uniform_(-0.2, 0.2)
        last = [m for m in model.g_a.modules() if isinstance(m, nn.Conv2d)][-1]
        last.weight.mul_(4 / model.g_a(x).std())
        heads = {"scales": "h_s", "means": "h_scale_s", "context": "entropy_parameters"}
        head = [m for m in getattr(model, heads[model.prior]).modules()
                if isinstance(m, nn.Conv2d)][-1]
        if head.bias is not None:
            head.bias.add_(4)
        else:
            before = [m for m in model.entropy_parameters if isinstance(m, nn.Conv2d)][-2]
            before.bias.add_(1)
            head.weight[: model.M].abs_()
    model.update(force=True)
    return model


def photograph(height=128, width=192):
    image = data.to_float(data.read_image(data.KODAK / "kodim23.png"))
    return image[None, :, 100 : 100 + height, 200 : 200 + width]
