"""Compare the speed with CompressAI's classes, at the paper's widths: part of `make bench`.

    python -m common.evaluation.bench qvrf

Decoding is timed with and without g_s. Stage 3 of training rounds each latent around a mean that
depends on previously rounded latents. Our wavefronts are compared with `Serial`, which works like
the paper's code: one position after the other, with a separate convolution for each.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from common.evaluation import bench
from common.training.network import autocast

import torch
import torch.nn.functional as F
from compressai.ops import quantize_ste
from torch import Tensor, nn

from qvrf.model import BASES, LMBDAS, QVRF, build, load

HERE = Path(__file__).parent
LEVEL = 5  # level of the training steps


def run(rounds: int) -> None:
    for base in ("minnen", "cheng"):
        decoding(base, rounds)
        training(base, rounds)


# -------------------------------------------------------------------------------------- coding
def decoding(base: str, rounds: int) -> None:
    """Time compress and decompress of a 512x768 image at level 0, where the base is equivalent."""
    ours, baseline = pair(base)
    x = bench.photograph()
    files = ours.compress(x, s=0), baseline.compress(x)

    def decode(model: nn.Module, file: dict, **rate: int) -> bench.Step:
        return torch.no_grad()(lambda: model.decompress(file["strings"], file["shape"], **rate))

    bench.compare(f"qvrf {base}: compress", lambda: ours.compress(x, s=0),
                  lambda: baseline.compress(x), rounds)
    steps = decode(ours, files[0], s=0), decode(baseline, files[1])
    bench.compare(f"qvrf {base}: decompress", *steps, rounds)
    ours.g_s = baseline.g_s = nn.Identity()
    bench.compare(f"qvrf {base}: decompress without g_s", *steps, rounds)


def pair(base: str) -> tuple[QVRF, nn.Module]:
    """Our model and CompressAI's with the same weights, at the width of the paper.

    They are the bundled weights of this base, widened; if there are none, random weights, scaled so
    that latents and their scales are those of a photograph at about 1 bit per pixel.
    """
    ours = build(base)
    bundled = HERE / "weights" / f"small-{base}.pth"
    if bundled.exists():
        ours = bench.widen(load(bundled), ours)
    else:
        make_lively(ours)
    ours.update(force=True)
    fixed = BASES[base](ours.N) if base == "cheng" else BASES[base](ours.N, ours.M)
    fixed.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "Gain"})
    return ours.eval().to(memory_format=torch.channels_last), fixed.eval()


@torch.no_grad()
def make_lively(model: QVRF) -> None:
    """Scale random weights so that not all latents are zero, with matching scales."""
    torch.manual_seed(0)
    x = bench.photograph()[..., :256, :256]
    y = model.g_a(x)
    last = model.g_a[-2] if model.model == "cheng" else model.g_a[-1]
    last.weight *= 1 / y.std()
    model.entropy_parameters[4].bias[: model.M] = 1.0


# ------------------------------------------------------------------------------------- training
def training(base: str, rounds: int) -> None:
    """Time a step of stage 3 on 8 crops of 256x256: ours in bf16 against fp32 and a serial loop.

    The rounding is also timed alone, from y and the output of h_s to the likelihoods of y, forward
    and backward.
    """
    torch.manual_seed(0)
    ours, theirs = build(base).train(), build(base).train()
    theirs.load_state_dict(ours.state_dict())
    serial = Serial(theirs)
    ours.to(memory_format=torch.channels_last)
    y, params = torch.randn(8, ours.M, 16, 16), torch.randn(8, 2 * ours.M, 16, 16)

    def rounding(model: QVRF, precision: str) -> bench.Step:
        def step() -> None:
            leaves = [t.clone().requires_grad_() for t in (y, params)]
            with autocast(y.device, precision):
                if model is theirs:
                    y_hat, likelihoods = serial.round(*leaves, model.gain(LEVEL))
                else:
                    a = model.gain(LEVEL)
                    y_hat = model.round_ste(*leaves, a)
                    likelihoods = model.y_likelihoods(leaves[0], y_hat, leaves[1], a)
            (y_hat.sum() - likelihoods.log2().sum()).backward()
            model.zero_grad()
        return step

    once(f"qvrf {base}: rounding of stage 3, 8x256x256", rounding(ours, "auto"),
         rounding(theirs, "fp32"), rounds)
    x = bench.tiles()

    def step(model: QVRF, net: nn.Module, x: Tensor, precision: str) -> bench.Step:
        return bench.descent(model, partial(net, s=LEVEL, ste=True), x, LMBDAS[LEVEL], precision)

    once(f"qvrf {base}: training step of stage 3, 8x256x256",
         step(ours, ours, x.contiguous(memory_format=torch.channels_last), "auto"),
         step(theirs, serial, x, "fp32"), rounds)


def once(name: str, ours: bench.Step, serial: bench.Step, rounds: int) -> None:
    """As bench.compare, but the serial loop, of half a minute or more, runs once per round."""
    bench.show(name, [(bench.seconds(serial), bench.timed(ours)) for _ in range(rounds)])


class Serial(nn.Module):
    """Stage 3 with a loop over positions in raster order, in floats, as in the paper's code."""

    def __init__(self, model: QVRF):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, s: int, ste: bool = True) -> dict:
        model = self.model
        a = model.gain(s)
        y = model.g_a(x)
        z = model.h_a(y)
        _, z_likelihoods = model.entropy_bottleneck(z)
        medians = model.entropy_bottleneck._get_medians().detach().view(1, -1, 1, 1)
        params = model.h_s(quantize_ste(z - medians) + medians)
        y_hat, y_likelihoods = self.round(y, params, a)
        return {"x_hat": model.g_s(y_hat), "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    def round(self, y: Tensor, params: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """y_hat and the likelihoods of y, one position after the other."""
        model, layer = self.model, self.model.context_prediction
        height, width = y.shape[-2:]
        kernel = layer.weight * layer.mask
        y_hat, likelihoods = F.pad(y, (2, 2, 2, 2)), torch.zeros_like(y)
        for h in range(height):
            for w in range(width):
                around = y_hat[:, :, h : h + 5, w : w + 5].clone()  # y_hat is written to below
                context = F.conv2d(around, kernel, layer.bias)
                hyper = params[:, :, h : h + 1, w : w + 1]
                scales, means = model.entropy_parameters(torch.cat([hyper, context], 1)).chunk(2, 1)
                latent = around[:, :, 2:3, 2:3]
                likelihoods[:, :, h : h + 1, w : w + 1] = model.gaussian_conditional(
                    (latent - means) * a, scales * a)[1]
                middle = means.detach()
                y_hat[:, :, h + 2 : h + 3, w + 2 : w + 3] = (
                    quantize_ste((latent - middle) * a) / a.detach() + middle)
        return y_hat[:, :, 2:-2, 2:-2], likelihoods
