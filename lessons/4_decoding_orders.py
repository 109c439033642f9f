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
# # 4. Raster, wavefront, checkerboard, channel slices: four orders of decoding
#
# Papers: D. Minnen, J. Ballé, G. Toderici, NeurIPS 2018
# ([arXiv:1809.02736](https://arxiv.org/abs/1809.02736)), Section 2, the context model in raster
# order; D. He, Y. Zheng, B. Sun, Y. Wang, H. Qin, CVPR 2021
# ([arXiv:2103.15306](https://arxiv.org/abs/2103.15306)), Section 3, the checkerboard; D. Minnen,
# S. Singh, ICIP 2020 ([arXiv:2007.08739](https://arxiv.org/abs/2007.08739)), channel slices, here
# as "ChARM" in Y. Zhu, Y. Yang, T. Cohen, ICLR 2022. Code: `joint_ar/model.py`,
# `checkerboard/model.py`, `tbtc/slices.py`, `common/coding/context.py`.
#
# A context model predicts mean and scale of a latent from side information $\hat z$ *and* from
# latents that were decoded before:
#
# $$ p(\hat y \mid \hat z) = \prod_i p\bigl(\hat y_i \mid \hat y_{C(i)}, \hat z\bigr). $$
#
# The larger the context $C(i)$, the fewer bits. But a latent can only be decoded after its context,
# and this decides how many steps the decoder takes one after the other. Four choices of $C(i)$:

# %%
import math
import os
import time

from common import data, metrics
from common.coding import entropy, exact, image_file
from common.coding.context import Context, wavefront
from common.papers import ROOT

import matplotlib.pyplot as plt
import torch

import checkerboard.model
import joint_ar.model
import tbtc.model

SHORT = os.environ.get("SHORT") == "1"  # SHORT=1: small images, to try the notebook
LMBDAS = {"joint_ar": (0.0035, 0.013), "checkerboard": (0.0035, 0.013), "tbtc": (0.0035,)}
NAMES = ["kodim23"] if SHORT else ["kodim05", "kodim15", "kodim23"]

models = {paper: [module.load(ROOT / paper / f"weights/small-{prefix}{lmbda}.pth")
                  for lmbda in LMBDAS[paper]]
          for paper, module, prefix in (("joint_ar", joint_ar.model, ""),
                                        ("checkerboard", checkerboard.model, ""),
                                        ("tbtc", tbtc.model, "swint-charm-"))}
pictures = [data.read_image(data.KODAK / f"{name}.png") for name in NAMES]
if SHORT:
    pictures = [x[:, 128:256, 256:448] for x in pictures]
for paper, nets in models.items():
    for lmbda, net in zip(LMBDAS[paper], nets, strict=True):
        print(f"{paper:13} lmbda {lmbda:<6}  N, M = {net.N}, {net.M:<3}  "
              f"{net.provenance.total_steps:6,} steps of training")

# %% [markdown]
# ## The orders
#
# Each map shows in which step a latent is decoded.
#
# - *raster*: one latent position after the other. The context is the 12 positions above and to the
#   left, in a 5x5 window.
# - *wavefront*: the same context. The latents at $(x, y)$ with equal $t = x + 3y$ do not see each
#   other, and everything that they see has a smaller $t$, so they are decoded together.
# - *checkerboard*: first every second position from $\hat z$ alone, then the others, whose context
#   is the 12 decoded positions around them.
# - *channel slices*: all positions at once, but only some of the channels; the context is the
#   slices before.

# %%
h, w = 8, 12
maps = torch.zeros(2, h * w)
maps[0] = torch.arange(h * w)
for step, wave in enumerate(wavefront(h, w)):
    maps[1, wave] = step
anchors = checkerboard.model.anchors(h, w)
slices = models["tbtc"][0].slices
figure, axes = plt.subplots(1, 4, figsize=(14, 3), layout="constrained")
pictures_of_orders = [(maps[0].view(h, w), "raster"), (maps[1].view(h, w), "wavefront"),
                      ((~anchors).float(), "checkerboard"),
                      (torch.arange(len(slices)).repeat_interleave(-(-h // len(slices)))
                       [:h, None].expand(h, w), "channel slices (rows: channels)")]
for axis, (order, title) in zip(axes, pictures_of_orders, strict=True):
    axis.imshow(order, cmap="viridis")
    axis.set(title=f"{title}: {int(order.max()) + 1} steps", xticks=[], yticks=[])
    for i in range(h):
        for j in range(w):
            axis.text(j, i, int(order[i, j]), ha="center", va="center", color="w", fontsize=7)
plt.show()

# %% [markdown]
# That the wavefront never runs ahead of its context can be checked: the time $t$ of each of the 12
# neighbours is smaller.

# %%
offsets = [(dy, dx) for dy in (-2, -1, 0) for dx in range(-2, 3) if (dy, dx) < (0, 0)]
assert len(offsets) == 12
assert all(dx + 3 * dy < 0 for dy, dx in offsets)
height, width = (-(-side // 64) * 4 for side in pictures[0].shape[-2:])
print(f"{height}x{width} latents: {height * width} steps in raster order, "
      f"{len(wavefront(height, width))} waves, 2 passes, {len(slices)} slices")


# %% [markdown]
# ## The same latents, in raster order and in waves
#
# The first two orders share one model, one context and, as we will see, every bit of the
# reconstruction. `Context` (`common/coding/context.py`) computes means and scales for any group of
# positions; the order is a list of groups.

# %%
def code(model, x, groups):
    """Encode x (1, 3, H, W) with joint_ar in this order; return y_hat, string and params."""
    y = model.g_a(image_file.pad(x, 64))
    z_hat = entropy.dequantize(model.entropy_bottleneck, model.h_a(y))
    params = exact.run(model.h_s, z_hat)
    context = Context(model.context_prediction, model.entropy_parameters, params,
                      model.gaussian_conditional.scale_table)
    rows = y.to(params).flatten(2).transpose(1, 2)  # (1, h * w, M)
    coded = []

    def rounded(positions, indexes, means):
        symbols = torch.round(rows[:, positions] - means)
        coded.append((symbols, indexes))
        return symbols

    context.walk(groups, rounded)
    symbols, indexes = (torch.cat(column, 1) for column in zip(*coded, strict=True))
    tables = entropy.Tables.of(model.gaussian_conditional)
    return context.y_hat(), entropy.encode(symbols, indexes, tables), params


def decode(model, strings, params, groups):
    """Decode the latents of joint_ar in this order."""
    context = Context(model.context_prediction, model.entropy_parameters, params,
                      model.gaussian_conditional.scale_table)
    decoder = entropy.Decoders(strings, model.M * params.shape[-2] * params.shape[-1],
                               entropy.Tables.of(model.gaussian_conditional))
    context.walk(groups, lambda _, indexes, means: decoder.decode(indexes).to(means))
    decoder.finish()
    return context.y_hat()


def timed(function, repeats=1 if SHORT else 3):
    """Result and shortest time in seconds."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - begin)
    return result, min(seconds)


x = data.to_float(pictures[-1])[None]
model = models["joint_ar"][1]
times, steps = {}, {}
with torch.no_grad():
    found = {}
    for name, groups in (("raster", list(torch.arange(height * width).split(1))),
                         ("wavefront", wavefront(height, width))):
        y_hat, strings, params = code(model, x, groups)
        decoded, times[name] = timed(lambda s=strings, p=params, g=groups: decode(model, s, p, g))
        assert torch.equal(decoded, y_hat)
        found[name], steps[name] = y_hat, len(groups)
        print(f"{name:10} {len(strings[0]):6,} bytes of y, {len(groups):5,} steps, "
              f"{times[name]:.3f} s to decode the latents")
assert torch.equal(found["raster"], found["wavefront"])
print(f"equal latents; the wavefront is {times['raster'] / times['wavefront']:.1f} times as fast")

# %% [markdown]
# The order of the symbols in the string is another one, so the strings differ; the latents do not.
# A wave of $n$ positions is one product of matrices with $n$ rows in place of $n$ products with one
# row.
#
# ## Two passes, and slices
#
# The other two orders have other contexts, so they are other models, trained as such. We time the
# same part of the decoder: from $\hat z$ to $\hat y$.

# %%
with torch.no_grad():
    net = models["checkerboard"][1]
    coded = net.compress(image_file.pad(x, 64))
    *y_strings, z_strings = coded["strings"]
    tables = entropy.Tables.of(net.gaussian_conditional)
    z_hat = entropy.decode_bottleneck(net.entropy_bottleneck, z_strings, coded["shape"])
    params = exact.run(net.h_s, z_hat)
    is_anchor = checkerboard.model.anchors(height, width).flatten()

    def two_passes():
        context = Context(net.context_prediction, net.entropy_parameters, params,
                          net.gaussian_conditional.scale_table)
        for use_context, mask, strings in ((False, is_anchor, y_strings[0]),
                                           (True, ~is_anchor, y_strings[1])):
            positions = mask.nonzero().flatten()
            decoder = entropy.Decoders(strings, net.M * len(positions), tables)
            context.walk([positions], lambda _, indexes, means, d=decoder: d.decode(indexes)
                         .to(means), use_context)
            decoder.finish()
        return context.y_hat()

    y_hat, times["checkerboard"] = timed(two_passes)
    steps["checkerboard"] = 2
    whole = net.decompress(coded["strings"], coded["shape"])["x_hat"]
    assert (net.g_s(y_hat).clamp(0, 1) - whole).abs().max() < 1e-4
    print(f"checkerboard: {len(y_strings[0][0]):,} bytes for the first half of the positions, "
          f"{len(y_strings[1][0]):,} for the second")

    charm = models["tbtc"][0]
    coded = charm.compress(image_file.pad(x, 64))
    z_hat = entropy.decode_bottleneck(charm.entropy_bottleneck, coded["strings"][1],
                                      coded["shape"])
    _, times["channel slices"] = timed(lambda: charm.decode(coded["strings"][0], z_hat))
    steps["channel slices"] = len(charm.slices)
    y = charm.g_a(image_file.pad(x, 64))
    *_, parts = charm.encode(y, z_hat)
    sizes = [len(entropy.encode(*part, entropy.Tables.of(charm.gaussian_conditional))[0])
             for part in parts]
    print(f"channel slices of {charm.slices} channels: {sizes} bytes")

# %% [markdown]
# In the checkerboard, both halves have the same number of latents, and the one with the context
# takes fewer bytes. Slices are not alike: training decides which channels come first.
#
# ## Time against rate
#
# Now whole files of all images at the operating points of each model: two of joint_ar and
# checkerboard, one of tbtc. To compare rates at one quality, that of tbtc, we take the logarithm of
# the rate of the others from the line through their two points, or a little beyond them.

# %%
points = {}
for paper, nets in models.items():
    points[paper] = []
    for net in nets:
        values = []
        for picture in pictures:
            file = image_file.encode_image(net, data.to_float(picture))
            x_hat = data.to_uint8(image_file.decode_image(net, file))
            values.append((metrics.bpp(len(file), *picture.shape[-2:]),
                           metrics.psnr(picture, x_hat)))
        points[paper].append([sum(column) / len(values) for column in zip(*values, strict=True)])
    text = ", ".join(f"{bpp:.4f} bpp {psnr:.2f} dB" for bpp, psnr in points[paper])
    print(f"{paper:13} {text}")

level = points["tbtc"][0][1]


def rate_at(psnr, found):
    """bpp at this PSNR, on the line through two points (log bpp against PSNR)."""
    if len(found) == 1:  # of tbtc, whose PSNR this is
        return found[0][0]
    (low, a), (high, b) = found
    share = (psnr - a) / (b - a)
    return math.exp((1 - share) * math.log(low) + share * math.log(high))


PAPER = {"raster": "joint_ar", "wavefront": "joint_ar", "checkerboard": "checkerboard",
         "channel slices": "tbtc"}
print(f"\nat {level:.2f} dB")
print("order            steps  seconds     bpp")
for order, paper in PAPER.items():
    print(f"{order:15} {steps[order]:6,} {times[order]:8.3f} {rate_at(level, points[paper]):7.4f}")

figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
for order, paper in PAPER.items():
    axis.plot(times[order], rate_at(level, points[paper]), "o", ms=9, label=order)
axis.set(xscale="log", xlabel="seconds from $\\hat z$ to $\\hat y$",
         ylabel=f"bits per pixel at {level:.2f} dB")
axis.legend()
plt.show()

# %% [markdown]
# Down and left is better. Two points lie at the same height by construction, as they are one model
# in two orders. Read the other heights with care: joint_ar and checkerboard have the same widths,
# but joint_ar was trained for more steps (see the first cell). The model with slices is built of
# Swin transformers and was trained for far fewer, so its height compares models, not orders. All
# four run in exact arithmetic (notebook 6), whose cost is a part of the times.
#
# ## Exercises
#
# Solutions: `4_decoding_orders_solutions.py`.
#
# **Exercise 1.** How many steps do raster, wavefront, checkerboard and four slices take for
# images of 512x768, 1024x1536 and 4096x6144 pixels? How does each number grow with the number of
# pixels, and what follows for a machine that computes any number of latents at once?
#
# **Exercise 2.** Write the wavefront for a 3x3 context of 4 positions (three above, one to the
# left). How many waves does it need for 32x48 latents?
#
# **Exercise 3.** Feed joint_ar a context of zeros (`context.walk(groups, symbols, context=False)`)
# and measure the size of the string. Why is this not the rate of a model without context? Do the
# same with the second half of the checkerboard.
