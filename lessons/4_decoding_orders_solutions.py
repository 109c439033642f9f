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
# # Solutions of notebook 4: four orders of decoding

# %%
import os
from functools import partial

from common import data
from common.coding import entropy, exact, image_file
from common.coding.context import Context, wavefront
from common.papers import ROOT

import torch

import checkerboard.model
import joint_ar.model

SHORT = os.environ.get("SHORT") == "1"  # SHORT=1: a small image, to try the notebook

# %% [markdown]
# ## Exercise 1: steps for larger images
#
# Raster order takes one step per latent, so it grows with the area. The wavefront has
# $w + 3(h - 1)$ waves: it grows with the sides, i.e. with the square root of the number of pixels.
# Checkerboard and slices take a constant number. On a machine with unlimited parallel units, this
# is the decoding time; on a CPU, the work per latent, which is the same for all, takes over as soon
# as the groups are large.

# %%
print("image            raster   wavefront  checkerboard  slices")
for height, width in ((512, 768), (1024, 1536), (4096, 6144)):
    h, w = height // 16, width // 16
    print(f"{height}x{width:<8} {h * w:10,} {w + 3 * (h - 1):11,} {2:13} {4:7}")
assert len(wavefront(32, 48)) == 48 + 3 * 31


# %% [markdown]
# ## Exercise 2: waves of a 3x3 context
#
# The context of $(x, y)$ is $(x - 1, y)$ and $(x - 1, \ldots, x + 1; y - 1)$. With
# $t = x + 2y$, all of them are earlier: $(x + 1, y - 1)$ has $t - 1$. A factor of 1 would not do:
# $(x + 1, y - 1)$ would have the same $t$.

# %%
def waves(height, width, slope):
    """Positions in groups of equal t = x + slope * y."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    t = (x + slope * y).flatten()
    return [(t == value).nonzero().flatten() for value in t.unique()]


def is_causal(groups, width, neighbours):
    """Whether all neighbours (dx, dy) of a position, within the map, come in earlier groups."""
    step = {int(p): k for k, group in enumerate(groups) for p in group}
    return all(step[p + dx + dy * width] < k for p, k in step.items() for dx, dy in neighbours
               if 0 <= p % width + dx < width and p // width + dy >= 0)


context = [(-1, 0), (-1, -1), (0, -1), (1, -1)]
assert is_causal(waves(8, 12, 2), 12, context) and not is_causal(waves(8, 12, 1), 12, context)
print(f"32x48 latents: {len(waves(32, 48, 2))} waves; with a 5x5 context {len(waves(32, 48, 3))}")

# %% [markdown]
# ## Exercise 3: without the context
#
# The network was trained with a context, and relies on it; with zeros in its place, the parameters
# are not those of a model without context but those of a network with a wrong input. The size of
# the string says how far it relies on it.
#
# The checkerboard was trained with zeros, but for the first half of the positions only. One might
# expect that the second half takes as many bytes as the first one then. It takes more, since $h_s$
# can tell the halves apart: its transposed convolutions have kernels of their own for each phase of
# the upsampling. So training has let $\hat z$ describe the first half, which has nothing else, and
# leave the second half to the context.

# %%
picture = data.read_image(data.KODAK / "kodim23.png")
if SHORT:
    picture = picture[:, 128:256, 256:448]
x = image_file.pad(data.to_float(picture)[None], 64)


@torch.no_grad()
def size(model, passes):
    """Bytes of y in these passes [(use_context, groups)], coded in one string each."""
    y = model.g_a(x)
    z_hat = entropy.dequantize(model.entropy_bottleneck, model.h_a(y))
    params = exact.run(model.h_s, z_hat)
    context = Context(model.context_prediction, model.entropy_parameters, params,
                      model.gaussian_conditional.scale_table)
    rows = y.to(params).flatten(2).transpose(1, 2)
    sizes = []
    for use_context, groups in passes:
        coded = []

        def rounded(positions, indexes, means, coded):
            symbols = torch.round(rows[:, positions] - means)
            coded.append((symbols, indexes))
            return symbols

        context.walk(groups, partial(rounded, coded=coded), use_context)
        symbols, indexes = (torch.cat(column, 1) for column in zip(*coded, strict=True))
        tables = entropy.Tables.of(model.gaussian_conditional)
        sizes.append(len(entropy.encode(symbols, indexes, tables)[0]))
    return sizes


h, w = x.shape[-2] // 16, x.shape[-1] // 16
joint = joint_ar.model.load(ROOT / "joint_ar/weights/small-0.013.pth")
print("joint_ar:     with context {:,} bytes, with zeros {:,}".format(
    *size(joint, [(True, wavefront(h, w))]), *size(joint, [(False, wavefront(h, w))])))
board = checkerboard.model.load(ROOT / "checkerboard/weights/small-0.013.pth")
first = checkerboard.model.anchors(h, w).flatten()
halves = [mask.nonzero().flatten() for mask in (first, ~first)]
for name, use in (("with context", True), ("with zeros", False)):
    anchors, others = size(board, [(False, [halves[0]]), (use, [halves[1]])])
    print(f"checkerboard: {name:12} {anchors:,} + {others:,} bytes")
