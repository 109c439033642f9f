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
# # 6. Why floats do not decode, and what exact arithmetic does
#
# Papers: the scale hyperprior (Ballé et al., ICLR 2018) and the joint model (Minnen, Ballé,
# Toderici, NeurIPS 2018, Section 2); the problem and a solution with integer networks: J. Ballé,
# N. Johnston, D. Minnen, *Integer networks for data compression with latent-variable models*, ICLR
# 2019. Code: `common/coding/exact.py`, `hyperprior/model.py`, `joint_ar/model.py`.
#
# An entropy decoder must have the probabilities of the encoder, exactly. In a model with a
# hyperprior, they come out of a network: the scale $\sigma_i$ of each latent chooses one of 64
# tables. If the decoder computes a single $\sigma_i$ on the other side of a boundary between two
# tables, it reads a wrong symbol, and from there on its position in the string is wrong, too.

# %%
import contextlib
import os
import time
import warnings
from functools import partial

from common import data, metrics
from common.coding import entropy, exact, exact_layers, image_file
from common.coding.context import Context, wavefront
from common.papers import ROOT

import matplotlib.pyplot as plt
import torch
from torch import nn

import hyperprior.model
import joint_ar.model

# torch warns of its own names when it switches oneDNN off
warnings.filterwarnings("ignore", message="(?s).*tf32")
SHORT = os.environ.get("SHORT") == "1"  # SHORT=1: a small image, to try the notebook

# %% [markdown]
# ## Sums of floats depend on their order
#
# A float32 has 24 bits. Each addition rounds, so another order of additions gives other last bits.
# Nobody fixes this order: it depends on the number of threads, the memory layout, the instructions
# of the processor, the version of the library. Sums of integers do not depend on it, as long as no
# intermediate result exceeds the bits of the number format.

# %%
torch.manual_seed(0)
a = torch.randn(4096)
orders = {"ascending": a.sort().values, "descending": a.sort(descending=True).values, "as drawn": a}
print("order       float32 sum     sum of multiples of 2^-12, in float64")
exact_sums = set()
for name, values in orders.items():
    total = torch.zeros(())
    for value in values:
        total += value
    on_grid = torch.round(values.double() * 2**12).cumsum(0)[-1] / 2**12
    exact_sums.add(float(on_grid))
    print(f"{name:10}  {float(total):.9f}  {float(on_grid):.12f}")
assert len(exact_sums) == 1

# %% [markdown]
# ## One network, five machines
#
# No second machine is needed to see it. The hyper synthesis $h_s$ of the bundled model computes the
# scales of one image under five settings of this machine, first in floating point.

# %%
net = hyperprior.model.load(ROOT / "hyperprior/weights/small-0.013.pth")
original = data.read_image(data.KODAK / "kodim23.png")
if SHORT:
    original = original[:, 64:320, 128:512]
height, width = original.shape[-2:]
x = image_file.pad(data.to_float(original)[None], 64)
table = net.gaussian_conditional.scale_table
with torch.no_grad():
    y = net.g_a(x)
    z_hat = entropy.dequantize(net.entropy_bottleneck, net.h_a(y.abs()))


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def without_onednn():
    return torch.backends.mkldnn.flags(enabled=False)


SETTINGS = {  # what surrounds the computation, and the memory format of its input
    "1 thread": (partial(threads, 1), torch.contiguous_format),
    "2 threads": (partial(threads, 2), torch.contiguous_format),
    "3 threads": (partial(threads, 3), torch.contiguous_format),
    "channels last": (contextlib.nullcontext, torch.channels_last),
    "without oneDNN": (without_onednn, torch.contiguous_format),
}


@torch.no_grad()
def under_all_settings(compute):
    """{setting: compute(z_hat)}."""
    found = {}
    for name, (setting, layout) in SETTINGS.items():
        with setting():
            found[name] = compute(z_hat.contiguous(memory_format=layout)).contiguous()
    return found


floats = under_all_settings(net.h_s)
reference = floats["1 thread"]
print(f"{reference.numel():,} scales in floating point, compared with those of one thread")
print("setting         other bits   largest difference   other tables")
for name, scales in floats.items():
    differ = int((scales != reference).sum())
    relative = float(((scales - reference).abs() / reference.clamp_min(0.11)).max())
    moved = int((exact.scale_indexes(scales, table)
                 != exact.scale_indexes(reference, table)).sum())
    print(f"{name:14} {differ:11,} {relative:20.1e} {moved:14}")

# %% [markdown]
# Whether a setting changes anything depends on this machine, so your table is not that of your
# neighbour; that is the point. A scale changes its table if a boundary lies within the difference.
# The boundaries are far apart and the differences tiny, but there are many scales: the next cell
# estimates how often it happens.

# %%
active = reference > table[0]
boundaries = exact.scale_boundaries(table).log()
logs = {name: scales[active].double().log() for name, scales in floats.items()}
distance = (logs["1 thread"][:, None] - boundaries).abs().min()
spacing = float(boundaries[1] - boundaries[0])
print(f"{int(active.sum()):,} scales lie above the smallest; boundaries are {spacing:.1%} apart; "
      f"the nearest scale is {float(distance):.1e} away from one")
# a boundary lies within a difference d with the probability d / spacing
moved = max(float((t - logs["1 thread"]).abs().sum()) / spacing for t in logs.values())
print(f"under the worst setting, {moved:.2g} other tables are expected per image of this size")

# %% [markdown]
# ## One flipped index
#
# Now we flip a single index ourselves. The joint model shows best what follows, as its latents are
# decoded from the top left to the bottom right. Its decoder computes the next group of latents,
# asks for their tables, and reads the symbols. In one group, we add 1 to the index of one latent.

# %%
joint = joint_ar.model.load(ROOT / "joint_ar/weights/small-0.013.pth")
with torch.no_grad():
    coded = joint.compress(x)
y_strings, z_strings = coded["strings"]
z_joint = entropy.decode_bottleneck(joint.entropy_bottleneck, z_strings, coded["shape"])
params = exact.run(joint.h_s, z_joint)
h, w = params.shape[-2:]
tables = entropy.Tables.of(joint.gaussian_conditional)


@torch.no_grad()
def decode_with_flip(position):
    """Latents (M, h, w), with the table of one latent at (row, column) flipped; None: without."""
    context = Context(joint.context_prediction, joint.entropy_parameters, params,
                      joint.gaussian_conditional.scale_table)
    decoder = entropy.Decoders(y_strings, joint.M * h * w, tables)
    place = -1 if position is None else position[0] * w + position[1]

    def read(positions, indexes, means):
        here = (positions == place).nonzero().flatten()
        if len(here):  # the largest scale of this position moves to the next table
            indexes = indexes.clone()
            channel = int(indexes[0, here[0]].argmax())
            indexes[0, here[0], channel] = (indexes[0, here[0], channel] + 1).clamp_max(63)
        return decoder.decode(indexes).to(means)

    context.walk(wavefront(h, w), read)
    try:
        decoder.finish()
        message = "the string ends where it should"
    except ValueError as e:
        message = str(e)
    return context.y_hat()[0], message


def picture(y_hat):
    """The decoded image; broken latents are limited, so that there is something to see."""
    with torch.no_grad():
        x_hat = joint.g_s(y_hat.clamp(-60, 60)[None])[0, :, :height, :width]
    return data.to_uint8(x_hat.nan_to_num(0).clamp(0, 1))


right, message = decode_with_flip(None)
print(f"no flip: {message}; {metrics.psnr(original, picture(right)):.2f} dB")
places = [(h - 3, w - 4), (h // 2, w // 2), (1, 2)]
flipped = [decode_with_flip(place) for place in places]
print("flip at     wrong latents   PSNR      what the decoder notices at the end")
for place, (y_hat, message) in zip(places, flipped, strict=True):
    wrong = float((y_hat != right).float().mean())
    print(f"{str(place):10} {wrong:13.1%}   {metrics.psnr(original, picture(y_hat)):5.2f} dB  "
          f"{message}")
    row, column = place
    before = [p for wave in wavefront(h, w) for p in wave.tolist()
              if p % w + 3 * (p // w) < column + 3 * row]
    assert torch.equal(y_hat.flatten(1)[:, before], right.flatten(1)[:, before])

# %% [markdown]
# The assertion in the last line of the loop holds: all waves before the flip are intact. Above, the
# positions with at least one wrong latent; below, the pictures.

# %%
figure, axes = plt.subplots(2, 4, figsize=(14, 5.2), layout="constrained")
for column, (title, y_hat) in enumerate(
        [("no flip", right), *((f"flip at {place}", y_hat)
                               for place, (y_hat, _) in zip(places, flipped, strict=True))]):
    axes[0, column].imshow((y_hat != right).any(0), cmap="Reds", vmin=0, vmax=1)
    axes[0, column].set_title(title)
    axes[1, column].imshow(picture(y_hat).permute(1, 2, 0))
for axis, (row, column) in zip(axes[0, 1:], places, strict=True):
    axis.plot(column, row, "k+", ms=10)  # the flipped position
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# How fast the damage spreads, for the flip in the middle: the number of wrong latents in each wave.
# The string is read with the wrong tables from the flip on, and wrong latents make wrong means and
# scales for the next waves.

# %%
y_hat = flipped[1][0]
waves = wavefront(h, w)
wrong = [float((y_hat != right).flatten(1)[:, wave].float().mean()) for wave in waves]
hit = next(i for i, wave in enumerate(waves) if places[1][0] * w + places[1][1] in wave.tolist())
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
axis.plot(wrong)
axis.axvline(hit, color="k", ls="--", lw=1)
axis.set(xlabel="wave", ylabel="share of wrong latents", title="dashed: the wave of the flip")
plt.show()
print(f"no wrong latent before wave {hit}: {max(wrong[:hit], default=0.0) == 0}; "
      f"in the 10 waves behind it, {sum(wrong[hit + 1:hit + 11]) / 10:.0%} are wrong")
behind = torch.cat(waves[hit + 1:])
near = (torch.maximum(right.abs(), y_hat.abs()) < 0.5).flatten(1)[:, behind].float().mean()
print(f"{near:.0%} of the latents behind it are below 0.5 in magnitude in both decodes")

# %% [markdown]
# Nearly all latents behind the flip differ, as a wrong mean is enough for that. Not every wrong
# value is visible: most latents are close to 0, and are so in the wrong decode, too. But a file is
# lost from the flip on. The decoder notices at the very end, as the string does not end where it
# should; then it is too late.
#
# ## Exact arithmetic
#
# `exact.run` computes the same layers with integers. Weights are rounded to
# $w = q \cdot 2^{-s}$ with 16-bit integers $q$ and one exponent $s$ per output channel; inputs of a
# layer are rounded to multiples of $2^{-12}$ and limited to $\pm 2^{12}$. A product is then an
# integer multiple of $2^{-12-s}$, and so are all partial sums. In float64, such numbers are exact
# below $2^{53}$ units, so the order of summation does not matter if
#
# $$ \sum_j |q_j| \cdot \max|a| + |b| < 2^{53} . $$
#
# This bound is checked for each layer when it is prepared; here are its values for $h_s$.

# %%
print("layer              largest sum")
for name, layer in net.h_s.named_children():
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        prepared = exact_layers.prepare(layer, name, torch.device("cpu"))
        largest = (prepared.weight.abs().sum((1, 2, 3)) * 2.0 ** (prepared.grid_bits
                   + prepared.clamp_bits) + prepared.bias.flatten().abs())
        exponent = float(largest.max().log2())
        print(f"h_s.{name} {type(layer).__name__:16} 2^{exponent:.1f}")
        assert 24 < exponent < 53  # too large for float32, small enough for float64

# %% [markdown]
# And the five settings again.

# %%
integers = under_all_settings(lambda z: exact.run(net.h_s, z))
for name, scales in integers.items():
    same = torch.equal(scales, integers["1 thread"])
    print(f"{name:14} {'the same bits' if same else 'other bits'}")
    assert same

# %% [markdown]
# ## What it costs
#
# Time, and a little rate: the rounded weights are not those that were trained.

# %%
def timed(function, repeats=1 if SHORT else 5):
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        with torch.no_grad():
            result = function()
        seconds.append(time.perf_counter() - begin)
    return result, min(seconds)


def rate(scales):
    """Bits per pixel of y with these scales, coded with the nearest of the 64 tables."""
    indexes = exact.scale_indexes(scales, table)
    return 8 * len(entropy.encode(y.round(), indexes, entropy.Tables.of(
        net.gaussian_conditional))[0]) / (height * width)


in_floats, seconds_float = timed(lambda: net.h_s(z_hat))
in_integers, seconds_exact = timed(lambda: exact.run(net.h_s, z_hat))
print(f"h_s in floats:   {1000 * seconds_float:6.1f} ms, y takes {rate(in_floats):.5f} bpp")
print(f"h_s in integers: {1000 * seconds_exact:6.1f} ms, y takes {rate(in_integers):.5f} bpp")
relative = float(((in_floats - in_integers).abs() / in_floats.clamp_min(0.11)).max())
print(f"largest relative difference of a scale: {relative:.1e}")

# %% [markdown]
# $g_a$ and $g_s$ stay in floating point: the encoder alone uses $g_a$, and a different last bit in
# $g_s$ changes a pixel by less than its rounding to 8 bits can show. Only what the decoder must
# *repeat* has to be exact.
#
# ## Exercises
#
# Solutions: `6_exact_decoding_solutions.py`.
#
# **Exercise 1.** In `hyperprior`, the latents of a string are ordered channel by channel. Flip one
# index of its $\hat y$ in the first, a middle and the last channel, decode, and show the pictures.
# What does the order change about the damage?
#
# **Exercise 2.** Protect the file: code the rows of the latent in strips of four, one string each,
# so that a flip only hurts its strip. Flip an index and decode. How many bytes do the strips cost
# for the hyperprior of this notebook?
#
# **Exercise 3.** Could floats be saved by an encoder that lists the latents whose scales lie near a
# boundary, with their tables? Count, for several widths of "near", how many latents these are and
# how many bytes their list takes. When does this scheme fail nevertheless?
