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
# # Solutions of notebook 3: the hyperprior as side information

# %%
import os

from common import data
from common.coding import bitstream, image_file
from common.loss import bits
from common.papers import ROOT

import matplotlib.pyplot as plt
import torch

from hyperprior.model import load

SHORT = os.environ.get("SHORT") == "1"  # SHORT=1: small images, to try the notebook
NAMES = ["kodim23"] if SHORT else ["kodim05", "kodim15", "kodim23"]
models = {lmbda: load(ROOT / f"hyperprior/weights/small-{lmbda}.pth")
          for lmbda in ("0.0035", "0.013")}
pictures = {name: data.read_image(data.KODAK / f"{name}.png") for name in NAMES}
if SHORT:
    pictures = {name: x[:, 64:320, 128:512] for name, x in pictures.items()}
model = models["0.013"]
picture = pictures["kodim23"]
x = image_file.pad(data.to_float(picture)[None], 64)
pixels = picture.shape[-2] * picture.shape[-1]

# %% [markdown]
# ## Exercise 1: the share of z

# %%
print("lmbda   image      y      z  share of z")
shares = {}
for lmbda, net in models.items():
    for name, image in pictures.items():
        file = image_file.encode_image(net, data.to_float(image))
        y_string, z_string = bitstream.unpack(file, net.tag).sections
        shares.setdefault(lmbda, []).append(len(z_string) / len(file))
        print(f"{lmbda:6}  {name} {len(y_string):6,} {len(z_string):6,}  {shares[lmbda][-1]:.1%}")
means = {lmbda: sum(values) / len(values) for lmbda, values in shares.items()}
print(", ".join(f"{lmbda}: {mean:.1%}" for lmbda, mean in means.items()))

# %% [markdown]
# Compare the two means. Scales are coarse information: they do not become much dearer when the
# latents get finer, so that the share of z tends to fall with the rate.
#
# ## Exercise 2: wrong scales on purpose
#
# The minimum lies near 1 if the scales are right on average. It is flat there: the cost of a wrong
# scale grows with the square of its logarithm, to first order.

# %%
with torch.no_grad():
    y = model.g_a(x)
    z_hat = model.entropy_bottleneck(model.h_a(y.abs()))[0]
    scales = model.h_s(z_hat)
    factors = [2 ** (i / 8) for i in range(-8, 9)]
    rates = [float(bits(model.gaussian_conditional(y, scales * factor)[1])) / pixels
             for factor in factors]
best = min(range(len(rates)), key=rates.__getitem__)
print(f"the lowest rate is at the factor {factors[best]:.2f}: {rates[best]:.4f} bpp, at 1 it is "
      f"{rates[8]:.4f}; at 0.5 {rates[0]:.4f}, at 2 {rates[-1]:.4f}")
figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
axis.semilogx(factors, rates, "o-")
axis.set(xlabel="factor of all scales", ylabel="bits per pixel of y")
plt.show()

# %% [markdown]
# ## Exercise 3: what one position of z reaches
#
# $h_s$ has two transposed 5x5 convolutions of stride 2 and a 3x3 convolution. One position of
# $\hat z$ reaches 5 positions after the first, $2 \cdot (5 - 1) + 5 = 13$ after the second, and 15
# after the third.

# %%
with torch.no_grad():
    i, j = z_hat.size(2) // 2, z_hat.size(3) // 2
    changed = z_hat.clone()
    changed[:, :, i, j] = 0
    difference = (model.h_s(changed) - scales).abs().amax((0, 1))
rows, columns = (difference.amax(dim).nonzero().flatten() for dim in (1, 0))
extent = [int(v.max() - v.min()) + 1 for v in (rows, columns)]
print(f"{extent[0]}x{extent[1]} latents get other scales, of {tuple(difference.shape)}")
assert max(extent) <= 15
figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
figure.colorbar(axis.imshow(difference, cmap="magma"), ax=axis)
axis.set(title="largest change of a scale", xticks=[], yticks=[])
plt.show()
