# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Solutions of notebook 1: what a codec learns in ten minutes

# %%
import math
import os

from common import data, metrics
from common.loss import RateDistortionLoss, bits
from common.papers import ROOT
from common.training.images import find_images
from common.training.optimizers import make_optimizers

import matplotlib.pyplot as plt
import torch

from factorized.model import build, load

SHORT = os.environ.get("SHORT") == "1"  # SHORT=1: a few steps, to try the notebook
STEPS = 4 if SHORT else 150
BATCH, CROP = (2, 64) if SHORT else (8, 128)

original = data.read_image(data.KODAK / "kodim23.png")[:, :256, :384]
x = data.to_float(original)[None]
pixels = original.shape[-2] * original.shape[-1]
model, higher = (load(ROOT / f"factorized/weights/small-{lmbda}.pth")
                 for lmbda in ("0.0035", "0.013"))
medians = model.entropy_bottleneck.quantiles[:, 0, 1].detach()[None, :, None, None]

# %% [markdown]
# ## Exercise 1: what one latent draws
#
# All latents are set to their medians, one is raised, and the picture without it is subtracted. A
# single latent reaches as far as the kernels of $g_s$ do. The pictures of the channels with a high
# rate are smooth or oriented patterns, as the basis functions of a transform that packs the energy
# of natural images into few coefficients must be: the coarse ones carry most of the energy.
# Channels without rate draw little, as a decoder has no use for a latent that is always the same.
# The number below each picture is its largest change, in values of 0 to 255.

# %%
with torch.no_grad():
    y = model.g_a(x)
    cost = -model(x)["likelihoods"]["y"].log2().sum((0, 2, 3)) / pixels
    order = cost.argsort(descending=True)
    chosen = order[[0, 1, 2, 3, 5, 8, 13, 34, 55, 144]].tolist()
    quiet = medians.expand(1, -1, 7, 7).clone()
    base = model.g_s(quiet)
    figure, axes = plt.subplots(2, 5, figsize=(12, 5.5), layout="constrained")
    for axis, c in zip(axes.flat, chosen, strict=True):
        raised = quiet.clone()
        raised[0, c, 3, 3] += max(1.0, float(y[0, c].abs().max()) / 2)
        drawn = (model.g_s(raised) - base)[0]
        largest = float(drawn.abs().max())
        axis.imshow((0.5 + drawn / (2 * largest + 1e-9)).permute(1, 2, 0))
        axis.set(title=f"channel {c}: {cost[c].abs():.4f} bpp", xlabel=f"{255 * largest:.1f}",
                 xticks=[], yticks=[])
plt.show()


# %% [markdown]
# ## Exercise 2: coarser steps without training
#
# With half the latent, a step of the quantiser is two units of $y$. The density must follow: the
# probability of the integer $k$ is that of the interval of $y$ from $2k - 1$ to $2k + 1$. We
# measure the entropy of the symbols of each channel instead, which favours both sides alike.

# %%
def entropy_of(symbols):
    """Bits per pixel of symbols (1, M, h, w), by the histogram of each channel."""
    total = 0.0
    for channel in symbols[0]:
        _, counts = channel.unique(return_counts=True)
        total -= float((counts * (counts / counts.sum()).log2()).sum())
    return total / pixels


with torch.no_grad():
    points = {}
    for name, net, factor in (("lmbda 0.0035", model, 1.0), ("lmbda 0.013", higher, 1.0),
                              ("lmbda 0.013, halved", higher, 0.5)):
        centre = net.entropy_bottleneck.quantiles[:, 0, 1].detach()[None, :, None, None]
        symbols = torch.round((net.g_a(x) - centre) * factor)
        x_hat = data.to_uint8(net.g_s(symbols / factor + centre)[0].clamp(0, 1))
        points[name] = entropy_of(symbols), metrics.psnr(original, x_hat)
for name, (bpp, psnr) in points.items():
    print(f"{name:22} {bpp:.4f} bpp  {psnr:.2f} dB")
(low, a), (high, b), (bpp, psnr) = points.values()
line = a + (b - a) * math.log(bpp / low) / math.log(high / low)
print(f"between the trained models at {bpp:.4f} bpp: {line:.2f} dB, which is {line - psnr:.2f} dB "
      "more than with halved latents")

# %% [markdown]
# The halved latents of the model with the higher rate give a point of a lower rate. Compare it with
# the line through the points of the two trained models (PSNR against the logarithm of the rate): it
# lies below, since the transform was trained for the finer step, and the decoder has never seen
# latents as coarse as these.
#
# ## Exercise 3: another exchange rate
#
# With a larger $\lambda$, squared errors are dearer: the distortion falls first, at the price of
# the rate.

# %%
images = find_images(None, CROP, seed=0, flip=True, history=None, quiet=True)
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for lmbda in (0.0035, 0.035):
    torch.manual_seed(0)
    net = build(N=32, M=48)
    optimizer, aux_optimizer = make_optimizers(net, "muon", lr=0.002)
    criterion = RateDistortionLoss(lmbda)
    path = []
    for step, batch in enumerate(data.loader(images.crops, 0, STEPS, BATCH), 1):
        batch = data.to_float(batch)
        loss = criterion(net(batch), batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % max(1, STEPS // 10) == 0:
            with torch.no_grad():
                output = net.eval()(x)
            net.train()
            path.append((float(bits(output["likelihoods"]["y"])) / pixels,
                         metrics.psnr(original, data.to_uint8(output["x_hat"][0].clamp(0, 1)))))
    axis.plot(*zip(*path, strict=True), "o-", label=f"lmbda {lmbda}")
    print(f"lmbda {lmbda}: after {STEPS} steps {path[-1][0]:.3f} bpp, {path[-1][1]:.2f} dB")
axis.set(xlabel="bits per pixel", ylabel="PSNR in dB")
axis.legend()
plt.show()
