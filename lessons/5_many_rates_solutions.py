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
# # Solutions of notebook 5: one model, many rates

# %%
import os

from common import data, metrics
from common.coding import bitstream, image_file
from common.loss import bits
from common.papers import ROOT

import matplotlib.pyplot as plt
import torch

import hyperprior.model
import qvrf.model

SHORT = os.environ.get("SHORT") == "1"  # SHORT=1: small images, to try the notebook
model = qvrf.model.load(ROOT / "qvrf/weights/small-balle.pth")
fingerprint = bitstream.fingerprint(model)


def read(name):
    picture = data.read_image(data.KODAK / f"{name}.png")
    return picture[:, 256:384, 128:320] if SHORT else picture


original = read("kodim19")
height, width = original.shape[-2:]
x = data.to_float(original)


class Image:
    """An image that is analysed once; `code(factor)` gives its file's bytes and its PSNR."""

    def __init__(self, picture):
        self.picture, self.size = picture, picture.shape[-2:]
        self.latents = model.analyse(image_file.pad(data.to_float(picture)[None], 64))

    def code(self, factor):
        coded = model.encode(self.latents, factor=factor)
        file = image_file.pack_images(model, coded, self.size, fingerprint)[0]
        x_hat = image_file.crop(model.reconstruct(self.latents, factor=factor), self.size)[0]
        return len(file), metrics.psnr(self.picture, data.to_uint8(x_hat))


# %% [markdown]
# ## Exercise 1: the regulators of the paper
#
# Both sets of points lie on one curve, since a regulator only selects a point of the curve that the
# transforms offer. The learned values decide *where* on it the operating point of each $\lambda$
# lies. (What the transforms learned depends on the regulators of training, of course.)

# %%
image = Image(original)
learned = [model.gain(s).item() for s in range(model.levels)]
paper = [(value / qvrf.model.LMBDAS[0]) ** 0.5 for value in qvrf.model.LMBDAS[: model.levels]]
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for name, factors, style in (("learned", learned, "o"), ("the paper's", paper, "x")):
    points = [image.code(a) for a in factors]
    rates = [metrics.bpp(size, height, width) for size, _ in points]
    axis.plot(rates, [psnr for _, psnr in points], style, label=name)
    print(name, " ".join(f"{bpp:.3f}" for bpp in rates), "bpp")
axis.set(xlabel="bits per pixel", ylabel="PSNR in dB", xscale="log")
axis.legend()
plt.show()

# %% [markdown]
# ## Exercise 2: a fixed-rate model, without training
#
# At $a = 1$ this is the model as it was trained. Its decoder has seen neither coarser nor finer
# latents. Which of the two costs more?

# %%
fixed = hyperprior.model.load(ROOT / "hyperprior/weights/small-0.013.pth")
with torch.no_grad():
    padded = image_file.pad(x[None], 64)
    y = fixed.g_a(padded)
    z_hat, z_likelihoods = fixed.entropy_bottleneck(fixed.h_a(y.abs()))
    scales = fixed.h_s(z_hat)
    factors = [4 ** (i / 4) for i in range(-4, 5)]
    scaled = []
    for a in factors:
        rounded, likelihoods = fixed.gaussian_conditional(y * a, scales * a)
        x_hat = image_file.crop(fixed.g_s(rounded / a), (height, width))[0].clamp(0, 1)
        scaled.append((float(bits(likelihoods) + bits(z_likelihoods)) / (height * width),
                       metrics.psnr(original, data.to_uint8(x_hat))))
trained = [image.code(a) for a in (learned[0] / 2, *learned)]  # and one below level 0
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
axis.plot(*zip(*scaled, strict=True), "o-", label="fixed-rate hyperprior, scaled (estimate)")
axis.plot([metrics.bpp(size, height, width) for size, _ in trained], [p for _, p in trained],
          "s-", label="trained for many rates")
axis.set(xlabel="bits per pixel", ylabel="PSNR in dB", xscale="log")
axis.legend()
plt.show()
for a, (bpp, psnr) in zip(factors, scaled, strict=True):
    print(f"a = {a:.2f}: {bpp:.3f} bpp, {psnr:.2f} dB")

# %% [markdown]
# The models have the same widths and share their first 14,000 steps. The fixed-rate model then took
# 24,000 at one lmbda, the other 17,250 at eight, so heights can be compared, with some care. Up to
# $a = 1$, the fixed-rate model even lies a little above the curve of the other one, although its
# decoder never saw latents as coarse as these: its transforms were trained for longer. With a large
# $a$, it falls behind: the rate rises without much gain, since transforms that were trained for a
# coarse step lose more than the finer steps could save.
#
# ## Exercise 3: one budget for four pictures
#
# One bisection over the sum of the sizes, and, for comparison, one for each picture over its own
# quarter.

# %%
pictures = [Image(read(f"kodim{i:02d}")) for i in (1, 5, 15, 23)]
budget = 60_000 * sum(p.picture[0].numel() for p in pictures) // (4 * 512 * 768)


def largest(size, limit, steps=5 if SHORT else 12):
    """The largest factor at which size(factor) <= limit."""
    low, high = learned[0] / 8, learned[-1] * 2
    for _ in range(steps):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if size(middle) <= limit else (low, middle)
    return low


together = largest(lambda a: sum(p.code(a)[0] for p in pictures), budget)
alone = [largest(lambda a, p=p: p.code(a)[0], budget // 4) for p in pictures]
print(f"budget {budget:,} bytes")
for name, factors in (("one factor", [together] * 4), ("equal sizes", alone)):
    coded = [p.code(a) for p, a in zip(pictures, factors, strict=True)]
    print(f"{name:11}: sizes {[size for size, _ in coded]}, PSNR "
          f"{[round(psnr, 2) for _, psnr in coded]}, mean {sum(p for _, p in coded) / 4:.2f} dB")
    assert sum(size for size, _ in coded) <= budget

# %% [markdown]
# With one factor, a picture with much detail gets more of the budget. A common step of the
# quantiser is (nearly) a common slope of the rate-distortion curves, which minimises the sum of
# squared errors at a given sum of sizes. The mean PSNR is another measure: it is the mean of
# logarithms, in which an easy picture gains as many dB from a bit as a difficult one, or more.
