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
# # 5. One model, many rates
#
# Paper: K. Tong, Y. Wu, Y. Li, K. Zhang, L. Zhang, X. Jin, *QVRF: a quantization-error-aware
# variable rate framework for learned image compression*, ICIP 2023
# ([arXiv:2303.05744](https://arxiv.org/abs/2303.05744)). Code: `qvrf/model.py`, `qvrf/codec.py`.
#
# The models of the notebooks before have one rate each, given by the $\lambda$ of their training;
# another rate needs other weights. QVRF multiplies the latent by a number $a$, the *regulator*,
# before it is rounded, and divides by it afterwards:
#
# $$ q = \operatorname{round}\bigl(a\,(y - \mu)\bigr), \qquad \hat y = \frac{q}{a} + \mu, \qquad
#    p(q \mid \hat z) = \int_{q - 1/2}^{q + 1/2} \mathcal{N}\bigl(t; 0, (a\sigma)^2\bigr)\,dt . $$
#
# The step of the quantiser is $1/a$. The transforms, $\hat z$, $\mu$ and $\sigma$ do not depend on
# $a$. Training draws a level $s$ in each step and uses its own $\lambda_s$ and $a_s$. In the paper,
# the regulators start at $a_s = \sqrt{\lambda_s / \lambda_0}$; they are learned, but for $a_0 = 1$.
# The base codec here is the scale hyperprior, where $\mu = 0$.

# %%
import os

from common import data, metrics
from common.coding import bitstream, image_file
from common.evaluation import classical
from common.papers import ROOT

import matplotlib.pyplot as plt
import torch

from qvrf.codec import search
from qvrf.model import LMBDAS, load

SHORT = os.environ.get("SHORT") == "1"  # SHORT=1: a small image, to try the notebook

model = load(ROOT / "qvrf/weights/small-balle.pth")
path = data.KODAK / "kodim19.png"
original = data.read_image(path)
if SHORT:
    original = original[:, 256:384, 128:320]
height, width = original.shape[-2:]
x = data.to_float(original)
print(f"N = {model.N}, M = {model.M}, {model.levels} levels")

# %% [markdown]
# ## The regulators
#
# The bundled model did not start from the regulators of the paper. It was made from a fixed-rate
# codec, and its regulators rose in equal ratios from 1 to `start_gain` when training began. The
# last columns show what training made of them, and the steps of the quantiser that they give.

# %%
gains = [model.gain(s).item() for s in range(model.levels)]
paper = [(LMBDAS[s] / LMBDAS[0]) ** 0.5 for s in range(model.levels)]
highest = model.provenance.config["start_gain"]
start = [highest ** (s / (model.levels - 1)) for s in range(model.levels)]
print("level   lambda   paper's start    start   learned   step 1/a")
for s, (first, own, gain) in enumerate(zip(paper, start, gains, strict=True)):
    print(f"{s:5} {LMBDAS[s]:8} {first:15.3f} {own:8.3f} {gain:9.3f} {1 / gain:10.3f}")

# %% [markdown]
# ## One analysis, eight files
#
# `analyse` runs $g_a$, $h_a$ and $h_s$ once; `encode` rounds and codes its result at a level.

# %%
latents = model.analyse(image_file.pad(x[None], model.downsampling_factor))
fingerprint = bitstream.fingerprint(model)


def code(**rate):
    """The file of one rate, and what decoding it gives: (bytes of y, of z, bpp, PSNR, x_hat)."""
    coded = model.encode(latents, **rate)
    file = image_file.pack_images(model, coded, (height, width), fingerprint)[0]
    x_hat = data.to_uint8(image_file.decode_image(model, file))
    y_string, z_string = (strings[0] for strings in coded["strings"])
    return {"y": len(y_string), "z": len(z_string), "x_hat": x_hat,
            "bpp": metrics.bpp(len(file), height, width), "psnr": metrics.psnr(original, x_hat)}


levels = [code(s=s) for s in range(model.levels)]
print("level  bytes of y  bytes of z     bpp    PSNR")
for s, row in enumerate(levels):
    print(f"{s:5} {row['y']:11,} {row['z']:11,}  {row['bpp']:.4f}  {row['psnr']:.2f} dB")
assert len({row["z"] for row in levels}) == 1  # z does not depend on the rate

# %% [markdown]
# What the regulator does to one channel: the histogram of $q$ widens with $a$, and the rounded
# latent $\hat y$ follows $y$ more closely.

# %%
channel = int(latents.y.flatten(2).std(2)[0].argmax())
y = latents.y[0, channel].flatten()
ends = (0, model.levels - 1)
figure, axes = plt.subplots(1, 3, figsize=(14, 3.3), layout="constrained")
for axis, s in zip(axes, ends, strict=False):
    q = torch.round(y * gains[s])
    values, counts = q.unique(return_counts=True)
    axis.bar(values, counts / counts.sum(), width=1.0)
    axis.set(title=f"level {s}, $a$ = {gains[s]:.2f}: {len(values)} values of $q$", xlabel="$q$")
order = y.argsort()[:: max(1, len(y) // 200)]
axes[2].plot(y[order], "k", lw=1, label="$y$")
for s, color in zip(ends, ("C1", "C0"), strict=True):
    axes[2].plot(torch.round(y[order] * gains[s]) / gains[s], color, lw=1,
                 label=f"$\\hat y$, level {s}")
axes[2].set(title=f"channel {channel}, sorted latents")
axes[2].legend()
plt.show()

# %% [markdown]
# ## Any number between, and beyond
#
# $a$ need not be one of the eight: any positive number is a rate, and the file states it as a
# float32. The network was trained at eight values only.

# %%
count = 5 if SHORT else 17
low, high = gains[0] / 2, gains[-1] * 2
factors = [low * (high / low) ** (i / (count - 1)) for i in range(count)]
sweep = [code(factor=a) for a in factors]
jpeg = classical.jpeg([path], ms_ssim=False)["results"]

figure, axes = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
axes[0].loglog(factors, [row["bpp"] for row in sweep], ".-", label="continuous factor")
axes[0].loglog(gains, [row["bpp"] for row in levels], "o", mfc="none", ms=9, label="levels")
axes[0].set(xlabel="regulator $a$", ylabel="bits per pixel")
axes[1].semilogx([row["bpp"] for row in sweep], [row["psnr"] for row in sweep], ".-",
                 label="continuous factor")
axes[1].semilogx([row["bpp"] for row in levels], [row["psnr"] for row in levels], "o", mfc="none",
                 ms=9, label="levels")
if not SHORT:  # of the whole image
    axes[1].semilogx(jpeg["bpp"], jpeg["psnr-rgb"], "k--", label="JPEG")
axes[1].set(xlabel="bits per pixel", ylabel="PSNR in dB")
for axis in axes:
    axis.legend()
plt.show()
rates = [row["bpp"] for row in sweep]
assert rates == sorted(rates)
first, last = sweep[0], sweep[-1]
print(f"a = {factors[0]:.2f} to {factors[-1]:.1f}: {first['bpp']:.3f} to {last['bpp']:.3f} bpp, "
      f"{first['psnr']:.2f} to {last['psnr']:.2f} dB")
gain_of_last = levels[-1]["psnr"] - levels[-2]["psnr"]
print(f"the step from level {model.levels - 2} to {model.levels - 1} gains {gain_of_last:.2f} dB, "
      f"that from 1 to 2 {levels[2]['psnr'] - levels[1]['psnr']:.2f} dB")

# %% [markdown]
# The rate rises with $a$ without end, but the PSNR does not: even with infinitely fine steps,
# $g_s(g_a(x))$ is not $x$. The transforms of this small network lose much, so that its ceiling is
# low, and the last level nearly reaches it, as the next cell shows. Where the curve flattens,
# another model, with more channels, is due.

# %%
with torch.no_grad():
    ceiling = model.g_s(latents.y)[0, :, :height, :width].clamp(0, 1)
print(f"without any rounding: {metrics.psnr(original, data.to_uint8(ceiling)):.2f} dB; "
      f"the last level has {levels[-1]['psnr']:.2f} dB")

# %% [markdown]
# Three rates of one model.

# %%
chosen = [levels[0], levels[2], levels[-1]]
figure, axes = plt.subplots(1, 4, figsize=(14, 5.5 if height > width else 3.5),
                            layout="constrained")
axes[0].imshow(original.permute(1, 2, 0))
axes[0].set_title("original")
for axis, row in zip(axes[1:], chosen, strict=True):
    axis.imshow(row["x_hat"].permute(1, 2, 0))
    axis.set_title(f"{row['bpp']:.2f} bpp, {row['psnr']:.1f} dB")
for axis in axes:
    axis.axis("off")
plt.show()

# %% [markdown]
# ## A rate on demand
#
# As rate and quality increase with $a$, a target for one of them can be found by bisection of
# $\log a$, with one analysis for all tries.

# %%
target = (levels[1]["bpp"] + levels[3]["bpp"]) / 2
low, high = gains[1], gains[3]
print(f"target {target:.4f} bpp")
for step in range(1, 5 if SHORT else 11):
    middle = (low * high) ** 0.5
    reached = code(factor=middle)["bpp"]
    print(f"{step:2}: a = {middle:.5f} gives {reached:.4f} bpp")
    if reached <= target:
        low = middle
    else:
        high = middle

# %% [markdown]
# `python codec.py encode photo.png --bpp 0.5` does the same, with the function `search`, which
# returns the largest file within the target.

# %%
file, factor, text = search(model, x, "bpp", target)
bpp = metrics.bpp(len(file), height, width)
print(f"search: a = {factor:.5f}, {bpp:.4f} bpp, {text}")
assert bpp <= target

# %% [markdown]
# ## Exercises
#
# Solutions: `5_many_rates_solutions.py`.
#
# **Exercise 1.** Replace the learned regulators by the initial values of the paper,
# $\sqrt{\lambda_s / \lambda_0}$, by passing them as `factor`. Do the points leave the
# rate-distortion curve? What, then, do the learned values decide?
#
# **Exercise 2.** Use the fixed-rate model `hyperprior/weights/small-0.013.pth` in the same way:
# multiply $y$ by $a$ before rounding and the scales by $a$, without any training. Estimate rate and
# PSNR for $a$ from 1/4 to 4 and compare with the curve of this notebook.
#
# **Exercise 3.** A network camera has 60 kB for a burst of pictures. Find one common $a$ with
# which the files of four Kodak images fill them. How different are the sizes of the four files, and
# is a common $a$ better than equal sizes, in the mean PSNR?
