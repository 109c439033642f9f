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
# # Solutions of notebook 6: why floats do not decode

# %%
import math
import os

from common import data, metrics
from common.coding import entropy, exact, image_file
from common.papers import ROOT

import matplotlib.pyplot as plt
import torch

from hyperprior.model import load

SHORT = os.environ.get("SHORT") == "1"  # SHORT=1: a small image, to try the notebook
model = load(ROOT / "hyperprior/weights/small-0.013.pth")
original = data.read_image(data.KODAK / "kodim23.png")
if SHORT:
    original = original[:, 64:320, 128:512]
height, width = original.shape[-2:]
x = image_file.pad(data.to_float(original)[None], 64)
table = model.gaussian_conditional.scale_table
tables = entropy.Tables.of(model.gaussian_conditional)
with torch.no_grad():
    y = model.g_a(x)
    z_hat = entropy.dequantize(model.entropy_bottleneck, model.h_a(y.abs()))
scales = exact.run(model.h_s, z_hat)
indexes = exact.scale_indexes(scales, table)  # (1, M, h, w)
symbols = y.round()


def decode(string, indexes):
    """Symbols (float32) in the shape of indexes (1, ...), without the check at the end."""
    decoder = entropy.Decoder(string, indexes.numel(), tables)
    values = decoder.decode(indexes.flatten().numpy())
    return torch.from_numpy(values).view(indexes.shape).float()


def picture(y_hat):
    with torch.no_grad():
        x_hat = model.g_s(y_hat.clamp(-60, 60))[0, :, :height, :width]
    return data.to_uint8(x_hat.nan_to_num(0).clamp(0, 1))


# %% [markdown]
# ## Exercise 1: the order of the channels
#
# All latents of a channel come before those of the next one. A flip leaves the channels before it
# intact, and breaks all later ones at *all* positions: the damage does not spread over the picture,
# it is everywhere at once, and the earlier the flip, the worse.

# %%
string, = entropy.encode(symbols, indexes, tables)
assert torch.equal(decode(string, indexes), symbols)
share = (indexes[0] > 0).flatten(1).float().mean(1)
active = (share > 0.2).nonzero().flatten().tolist()  # channels that are not just zeros
figure, axes = plt.subplots(1, 3, figsize=(14, 3.5), layout="constrained")
for axis, c in zip(axes, (active[0], active[len(active) // 2], active[-1]), strict=True):
    flipped = indexes.clone()
    place = int(indexes[0, c].argmax())
    flipped[0, c].view(-1)[place] += 1
    y_hat = decode(string, flipped)
    assert torch.equal(y_hat[:, :c], symbols[:, :c])
    wrong = float((y_hat != symbols).float().mean())
    shown = picture(y_hat)
    axis.imshow(shown.permute(1, 2, 0))
    axis.set(title=f"flip in channel {c}: {metrics.psnr(original, shown):.1f} dB", xticks=[],
             yticks=[])
    print(f"channel {c:3} of {model.M}: {wrong:.1%} of the latents are wrong")
plt.show()

# %% [markdown]
# ## Exercise 2: strips
#
# Each strip of four rows of latents gets its own string. A flip is confined to one strip, i.e. to
# 64 rows of pixels and what $g_s$ mixes at its borders.

# %%
parts = list(zip(symbols.split(4, 2), indexes.split(4, 2), strict=True))
strings = [entropy.encode(s, i, tables)[0] for s, i in parts]
extra = sum(map(len, strings)) - len(string)
print(f"{len(strings)} strips: {sum(map(len, strings)):,} bytes in place of {len(string):,}, "
      f"{extra / len(strings):.1f} more per strip, besides the length of each")
hit = len(parts) // 2
decoded = []
for number, (part, (_, rows)) in enumerate(zip(strings, parts, strict=True)):
    rows = rows.clone().contiguous()
    if number == hit:
        rows.view(-1)[int(rows.argmax())] += 1
    decoded.append(decode(part, rows))
y_hat = torch.cat(decoded, 2)
intact = [n for n, (d, (s, _)) in enumerate(zip(decoded, parts, strict=True)) if torch.equal(d, s)]
assert intact == [n for n in range(len(parts)) if n != hit]
figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
axis.imshow(picture(y_hat).permute(1, 2, 0))
axis.set(title=f"flip in strip {hit}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Strips limit the damage; they do not prevent it. The decoder still needs exact scales.
#
# ## Exercise 3: a list of endangered latents
#
# The list needs the position of each latent and one bit for the side of the boundary. It is short,
# but "near" must be wider than the difference between any two machines, which nobody knows: with
# other instructions or a lower precision it may be a thousand times larger than here. And with a
# context model the next scales depend on what was decoded, so the list has to be made for all of
# them along the way.

# %%
boundaries = exact.scale_boundaries(table)
logs = scales.clamp_min(1e-9).log()
nearest = (torch.bucketize(logs, boundaries.log()).clamp_max(len(boundaries) - 1))
distance = torch.minimum((logs - boundaries.log()[nearest]).abs(),
                         (logs - boundaries.log()[(nearest - 1).clamp_min(0)]).abs())
print("near    latents   bytes of the list")
for near in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
    count = int((distance < near).sum())
    size = math.ceil(count * (math.log2(scales.numel()) + 1) / 8)
    print(f"{near:.0e} {count:8,} {size:12,}")
print(f"(the string of y has {len(string):,} bytes)")
