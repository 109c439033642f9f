"""Complexity of a network: parameters and multiply-accumulates."""

from __future__ import annotations

import copy
import functools
from typing import Any

from common.coding.contract import MultipliesActivations
from common.layers import mask_of

import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.layers import GDN
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.InstanceNorm2d, nn.PReLU)


def complexity(model: nn.Module, size: tuple[int, int] = (512, 768), **rate: float
               ) -> dict[str, int]:
    """Count parameters, and multiply-accumulates (MACs) of forward on one image (height, width).

    params_total  all parameters, including the quantiles of the entropy bottlenecks
    params_thop   parameters that the tool thop counts: those of convolutions, linear layers and
                  norms, but not of GDN, entropy models and masked convolutions
    macs_true     MACs of convolutions and linear layers; a transposed convolution uses each weight
                  once per input pixel
    macs_thop     the same, but once per output pixel, as thop counts: 4x too many at stride 2
    macs_gdn      MACs of the 1x1 convolutions inside GDN
    macs_masked   MACs of convolutions with a `mask` (context models), all taps counted
    macs_products MACs of products of two activations, as a module's `product_macs(x)` states them
    Biases, activations and entropy models are not counted. The forward runs on tensors without
    values and takes almost no time. rate: arguments of a variable-rate model's forward.
    """
    parts = complexity_of_parts(model, size, **rate).values()
    found = {key: sum(part[key] for part in parts) for key in next(iter(parts))}
    # parameters of the model itself belong to no child
    return found | {"params_total": sum(p.numel() for p in model.parameters())}


def complexity_of_parts(model: nn.Module, size: tuple[int, int] = (512, 768), **rate: float
                        ) -> dict[str, dict[str, int]]:
    """`complexity` of each child of the model (g_a, h_s, ...), by name."""
    model = copy.deepcopy(model).train()  # in eval mode, forward needs values
    kinds = ("true", "thop", "gdn", "masked", "products")

    def count(part: dict[str, int], layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if isinstance(layer, MultipliesActivations):
            part["macs_products"] += layer.product_macs(args[0])
        elif isinstance(layer, GDN):
            part["macs_gdn"] += out.numel() * layer.gamma.shape[1]
        elif isinstance(layer, nn.Linear):
            for key in ("macs_true", "macs_thop"):
                part[key] += out.numel() * layer.in_features
        else:
            inputs, outputs = args[0][0, 0].numel(), out[0, 0].numel()
            weights = layer.get_parameter("weight").numel()
            if mask_of(layer) is not None:
                part["macs_masked"] += outputs * weights
                return
            part["macs_true"] += (inputs if isinstance(layer, _TRANSPOSED) else outputs) * weights
            part["macs_thop"] += outputs * weights

    found = {}
    for name, child in model.named_children():
        part = found[name] = {"params_total": sum(p.numel() for p in child.parameters()),
                              "params_thop": 0} | {f"macs_{kind}": 0 for kind in kinds}
        for layer in child.modules():
            if (isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear, GDN))
                    or isinstance(layer, MultipliesActivations)):
                layer.register_forward_hook(functools.partial(count, part))
            if (isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear, *_NORMS))
                    and mask_of(layer) is None):
                part["params_thop"] += sum(p.numel() for p in layer.parameters())
            if isinstance(layer, EntropyBottleneck):  # its forward needs values
                layer.forward = lambda x, *_: (x, x)  # type: ignore[method-assign]  # on a copy
    device = next(model.parameters()).device
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.empty(1, 3, *size, device=device), **rate)
    return found
