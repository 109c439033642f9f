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
# # 3. The hyperprior as side information
#
# Paper: J. Ballé, D. Minnen, S. Singh, S. J. Hwang, N. Johnston, *Variational image compression
# with a scale hyperprior*, ICLR 2018 ([arXiv:1802.01436](https://arxiv.org/abs/1802.01436)),
# Section 3 and Figure 4. Code: `hyperprior/model.py`.
#
# A factorized prior (notebook 1) gives a latent the same density everywhere in the image. But the
# magnitudes of latents are not the same everywhere: they are large where the image has detail. The
# hyperprior makes the standard deviation $\sigma_i$ of each latent a function of *side
# information* $\hat z$, which is coded first:
#
# $$ \hat z = \operatorname{round}(h_a(|y|)), \qquad \sigma = h_s(\hat z), \qquad
#    p(\hat y_i \mid \hat z) = \int_{\hat y_i - 1/2}^{\hat y_i + 1/2}
#    \mathcal{N}(t; 0, \sigma_i^2)\, dt, $$
#
# so the rate has two parts, and the second one must pay for itself:
#
# $$ R = \mathbb{E}[-\log_2 p(\hat y \mid \hat z)] + \mathbb{E}[-\log_2 p(\hat z)] . $$

# %%
import os

from common import data, metrics
from common.coding import bitstream, exact, image_file
from common.loss import bits
from common.papers import ROOT

import matplotlib.pyplot as plt
import torch

from hyperprior.model import load

SHORT = os.environ.get("SHORT") == "1"  # SHORT=1: a small image, to try the notebook
WEIGHTS = ROOT / "hyperprior/weights/small-0.013.pth"

model = load(WEIGHTS)
original = data.read_image(data.KODAK / "kodim23.png")
if SHORT:
    original = original[:, 64:320, 128:512]
height, width = original.shape[-2:]
pixels = height * width
x = data.to_float(original)[None]
print(f"image {tuple(x.shape)}, N = {model.N}, M = {model.M}")

# %% [markdown]
# ## Latents and their scales
#
# The network in evaluation mode, step by step (compare `Hyperprior.forward`).

# %%
with torch.no_grad():
    x_padded = image_file.pad(x, model.downsampling_factor)
    y = model.g_a(x_padded)  # (1, M, H/16, W/16)
    z = model.h_a(y.abs())  # (1, N, H/64, W/64)
    z_hat, z_likelihoods = model.entropy_bottleneck(z)
    scales = model.h_s(z_hat)  # (1, M, H/16, W/16)
    y_hat, y_likelihoods = model.gaussian_conditional(y, scales)
y_bits, z_bits = -y_likelihoods.log2(), -z_likelihoods.log2()
for name, t, cost in (("y", y, y_bits), ("z", z, z_bits)):
    print(f"{name}: {str(tuple(t.shape)):18} {t.numel():7,} latents, "
          f"{float(cost.sum()) / pixels:.4f} bits per pixel")
share = float(z_bits.sum() / (y_bits.sum() + z_bits.sum()))
print(f"the side information is {share:.1%} of the rate")

# %% [markdown]
# The scale maps of the four channels that take the most bits (compare Figure 2 of the paper). From
# left to right: the image, the latents, the scales that the decoder computes from $\hat z$, the
# latents divided by their scales, and the bits of each latent. The structure of the image is
# visible in latents and scales. What is left of it in $y / \sigma$ is what the side information
# does not say.

# %%
floor = model.gaussian_conditional.lower_bound_scale.bound  # as in the likelihoods: 0.11
sigma = scales.clamp_min(floor)
top = y_bits.sum((0, 2, 3)).argsort(descending=True)[:4].tolist()
figure, axes = plt.subplots(4, 5, figsize=(14, 8), layout="constrained")
for row, c in zip(axes, top, strict=True):
    limit = float(y[0, c].abs().max()) / 2
    row[0].imshow(original.permute(1, 2, 0))
    row[1].imshow(y[0, c], cmap="RdBu", vmin=-limit, vmax=limit)
    row[2].imshow(sigma[0, c], cmap="viridis")
    row[3].imshow(y[0, c] / sigma[0, c], cmap="RdBu", vmin=-3, vmax=3)
    row[4].imshow(y_bits[0, c], cmap="magma")
    row[1].set_ylabel(f"channel {c}")
    for axis in row:
        axis.set(xticks=[], yticks=[])
for axis, title in zip(axes[0], ("image", "$y$", "$\\sigma = h_s(\\hat z)$", "$y / \\sigma$",
                                 "bits"), strict=True):
    axis.set_title(title)
plt.show()


# %% [markdown]
# In numbers: the magnitudes of neighbouring latents depend on each other, also in channels where
# the latents themselves hardly do. The division by $\sigma$ takes a part of this dependence away,
# namely what $\hat z$, at a quarter of the resolution, can express.

# %%
def neighbours(t):
    """Correlation of horizontal neighbours in a map (h, w)."""
    return float(torch.corrcoef(torch.stack([t[:, :-1].flatten(), t[:, 1:].flatten()]))[0, 1])


per_channel = y_bits.sum((0, 2, 3))
active = (per_channel > 0.01 * per_channel.sum()).nonzero().flatten().tolist()
rows = [(c, neighbours(y[0, c]), neighbours(y[0, c].abs()),
         neighbours(y[0, c].abs() / sigma[0, c])) for c in active]
least = min(rows, key=lambda row: abs(row[1]))[0]
print(f"correlation of neighbours; the latents of channel {least} depend least on each other")
print("channel      y      |y|   |y|/sigma")
for c, *values in [row for row in rows if row[0] in {*top, least}]:
    print(f"{c:7}" + "".join(f"{value:8.2f}" for value in values))
means = [sum(abs(row[i]) for row in rows) / len(rows) for i in (1, 2, 3)]
print("mean of" + "".join(f"{value:8.2f}" for value in means) + "  (of the magnitudes)")
print(f"the {len(rows)} channels that take more than 1 % of the bits each")

# %% [markdown]
# ## What the side information is worth
#
# How many bits would $\hat y$ take without it? We give each channel one constant scale, the best
# one of the model's 64 scales for this very image, and say nothing about the bits that would tell
# the decoder which. This is a factorized prior with Gaussian densities, at its best.

# %%
with torch.no_grad():
    symbols = y.round()
    costs = torch.stack([
        -model.gaussian_conditional(symbols, torch.full_like(symbols, float(scale)))[1].log2()
        .sum((0, 2, 3)) for scale in model.gaussian_conditional.scale_table])  # (64, M)
constant = float(costs.min(0).values.sum()) / pixels
with_side = float(y_bits.sum()) / pixels
side = float(z_bits.sum()) / pixels
print(f"y with the best constant scale of each channel: {constant:.4f} bpp")
print(f"y with scales from z:                           {with_side:.4f} bpp")
print(f"z:                                              {side:.4f} bpp")
print(f"z saves {constant - with_side:.4f} bpp for {side:.4f}: "
      f"{(constant - with_side) / side:.1f} bits for each of its own")

# %% [markdown]
# The comparison favours the constants, which know the image. It is also not quite that of the
# paper, where a factorized model is *trained* as such, and shapes its latents accordingly.
#
# $\hat z$ describes this one image. With the $\hat z$ of another image, or with zeros, the same
# latents cost more.

# %%
with torch.no_grad():
    other = data.to_float(data.read_image(data.KODAK / "kodim13.png"))[None, :, :height, :width]
    other = image_file.pad(other, model.downsampling_factor)
    z_other = model.entropy_bottleneck(model.h_a(model.g_a(other).abs()))[0]
    print("scales from         bpp of y")
    for name, source in (("its own z", z_hat), ("another image's z", z_other),
                         ("z = 0", torch.zeros_like(z_hat))):
        cost = float(bits(model.gaussian_conditional(y, model.h_s(source))[1])) / pixels
        print(f"{name:18} {cost:9.4f}")

# %% [markdown]
# ## In the file
#
# The file holds the two strings after a header. The decoder decodes $\hat z$ with the learned
# density of its channels, computes the scales, and picks for each latent one of 64 tables, whose
# scales are spaced evenly on a logarithmic axis. It must arrive at exactly the encoder's choice
# (notebook 6), so $h_s$ runs in fixed-point arithmetic there.

# %%
file = image_file.encode_image(model, x)
parts = bitstream.unpack(file, model.tag)
y_string, z_string = parts.sections
decoded = data.to_uint8(image_file.decode_image(model, file))
print(f"y {len(y_string):,} bytes, z {len(z_string):,} bytes, "
      f"header and checksum {len(file) - len(y_string) - len(z_string)} bytes")
print(f"{metrics.bpp(len(file), height, width):.4f} bpp in the file, {with_side + side:.4f} "
      f"estimated; PSNR {metrics.psnr(original, decoded):.2f} dB")

indexes = exact.scale_indexes(exact.run(model.h_s, z_hat), model.gaussian_conditional.scale_table)
counts = torch.bincount(indexes.flatten(), minlength=64)
cost = torch.zeros(64).index_add(0, indexes.flatten(), y_bits.flatten())
figure, axes = plt.subplots(1, 2, figsize=(12, 3.2), layout="constrained")
axes[0].bar(range(64), counts / counts.sum())
axes[0].set(title="share of the latents", xlabel="table (scale 0.11 to 256)", yscale="log")
axes[1].bar(range(64), cost / cost.sum())
axes[1].set(title="share of the bits", xlabel="table (scale 0.11 to 256)")
plt.show()
print(f"{float(counts[0] / counts.sum()):.0%} of the latents have the smallest scale; "
      f"they take {float(cost[0] / cost.sum()):.1%} of the bits")

# %% [markdown]
# Most latents are announced to be zero, and cost next to nothing. The picture of the bits shows
# where the rest goes.

# %%
figure, axes = plt.subplots(1, 3, figsize=(14, 3.3), layout="constrained")
axes[0].imshow(original.permute(1, 2, 0))
axes[0].set_title("image")
for axis, t, title in ((axes[1], y_bits, "y: bits per position"),
                       (axes[2], z_bits, "z: bits per position")):
    figure.colorbar(axis.imshow(t[0].sum(0), cmap="magma"), ax=axis)
    axis.set_title(title)
for axis in axes:
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Exercises
#
# Solutions: `3_hyperprior_solutions.py`.
#
# **Exercise 1.** What share of a file is $\hat z$ at the lower rate (`small-0.0035.pth`)? Predict
# first whether the share is larger or smaller there, then measure it on three images.
#
# **Exercise 2.** The scales are uncertain themselves. Multiply all of them by a factor between 0.5
# and 2 and plot the rate of $\hat y$. Where is the minimum, and what does its place say about the
# trained $h_s$?
#
# **Exercise 3.** Set one position of $\hat z$ to zero, in all channels. Which latents get other
# scales? Compare the size of this region with the kernels and strides of $h_s$.
