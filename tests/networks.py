"""A small network of every architecture of every paper, for facts that hold for all of them.

They are those that the papers list themselves. A new paper needs no entry here, if its `build` and
`forward` have no other arguments than N and M, and the image.
"""

import importlib

from common.papers import papers

import torch
from torch import nn

ENDS = {"g_a": 4.0, "h_a": 2.0, "h_s": 4.0, "entropy_parameters": 4.0}  # deviation of the results


def _options(paper):
    """Arguments of `build`, for each architecture."""
    if paper == "convnextic":
        sizes = {"embed_dim": 8, "latent_dim": 24, "layer_scale_init": 0.5}
        names = importlib.import_module("convnextic.variants").VARIANTS
        return [{"variant": name} | sizes for name in names]
    model = importlib.import_module(f"{paper}.model")
    if paper == "qvrf":
        return [{"model": name, "N": 16, "M": 16} for name in model.BASES]
    if paper == "tbtc":
        return [{"model": name, "quality": "XS"} for name in model.MODELS]
    if paper == "advdnic":
        return [{"experiment": name, "num_filters": 128 if name == "variant4" else 16}
                for name in model.EXPERIMENTS]
    return [{"N": 8, "M": 12}]


NETWORKS = {"-".join(map(str, [paper, *list(options.values())[:1]])): (paper, options)
            for paper in papers() for options in _options(paper)}


def build(name):
    """A network with random weights, in training mode."""
    paper, options = NETWORKS[name]
    torch.manual_seed(0)
    return importlib.import_module(f"{paper}.model").build(**options).train()


def arguments(name):
    """What `forward` needs besides the image."""
    paper, options = NETWORKS[name]
    if paper == "convnextic":
        return (torch.full((1,), 0.01) if options["variant"] == "v5_vr" else None,)
    return (3,) if paper == "qvrf" else ()


def lively(name, x):
    """A network that codes x (1, 3, H, W): latents and scales vary, and the tables are ready."""
    model = build(name).eval()
    for part, deviation in ENDS.items():
        layers = [m for m in getattr(model, part, nn.Identity()).modules()
                  if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
        if layers:
            found = []  # results of the last layer without its bias, which may outweigh the image
            hook = layers[-1].register_forward_hook(lambda layer, _, y, found=found: found.append(
                y if layer.bias is None else y - _along_channels(layer)))
            with torch.no_grad():
                model(x, *arguments(name))
                if found:
                    layers[-1].weight.mul_(deviation / found[-1].std())
            hook.remove()
    model.update(force=True)
    return model


def _along_channels(layer):
    """The bias in the shape of the layer's results."""
    return layer.bias if isinstance(layer, nn.Linear) else layer.bias.view(-1, 1, 1)
