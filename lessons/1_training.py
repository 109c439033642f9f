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
# # 1. What a codec learns in ten minutes
#
# Paper: J. Ballé, V. Laparra, E. P. Simoncelli, *End-to-end optimized image compression*, ICLR 2017
# ([arXiv:1611.01704](https://arxiv.org/abs/1611.01704)), Section 3; the network and the density are
# those of the factorized-prior baseline in Ballé et al., ICLR 2018
# ([arXiv:1802.01436](https://arxiv.org/abs/1802.01436)), appendix 6.1. Code: `factorized/model.py`.
#
# An analysis transform $g_a$ maps an image $x$ to latents $y = g_a(x)$. These are rounded to
# integers $\hat y$, an entropy coder writes $\hat y$ as bits, and a synthesis transform $g_s$ maps
# $\hat y$ back to an image $\hat x = g_s(\hat y)$. Training minimises the rate-distortion loss
#
# $$ L = \underbrace{\mathbb{E}\bigl[-\log_2 p_{\hat y}(\hat y)\bigr]}_{R\ \text{in bits per pixel}}
#   + \lambda \cdot 255^2 \cdot
#   \underbrace{\mathbb{E}\bigl[(x - \hat x)^2\bigr]}_{\text{mean squared error}} . $$
#
# Everything in it is learned together: $g_a$, $g_s$, and the density $p$ of each latent channel.
# This notebook trains the network of `factorized/quick.yaml` from random weights, and watches rate
# and distortion while it learns. It trains for `MINUTES` minutes, or for the 7,000 steps of
# `quick.yaml` if these take less time.

# %%
import copy
import os
import time

from common import data, metrics
from common.coding import image_file
from common.evaluation import classical
from common.loss import RateDistortionLoss, bits
from common.papers import ROOT
from common.training.images import find_images
from common.training.network import autocast
from common.training.optimizers import main_parameters, make_optimizers, make_scheduler

import matplotlib.pyplot as plt
import torch

from factorized.model import build, load

SHORT = os.environ.get("SHORT") == "1"  # SHORT=1: a few steps, to try the notebook
MINUTES = 8
STEPS = 6 if SHORT else 7_000  # at most
BATCH, CROP = (2, 64) if SHORT else (8, 128)
LMBDA = 0.0035

# %% [markdown]
# ## Data, network, optimisers
#
# The images are the photographs that the repository bundles; four of them are held out. The image
# that we watch is one of the Kodak set, which is never trained on.

# %%
torch.manual_seed(0)
device = torch.device("cpu")
images = find_images(None, CROP, seed=0, flip=True, history=None)
path = data.KODAK / "kodim23.png"
original = data.read_image(path)  # uint8 (3, 512, 768)
height, width = original.shape[-2:]
x_test = data.to_float(original)[None]
criterion = RateDistortionLoss(LMBDA)

model = build(N=48, M=64)
print(f"{len(images)} training images, {sum(p.numel() for p in model.parameters()):,} parameters")


# %% [markdown]
# One step, as in `factorized/train.py`. In training, $\hat y$ is replaced by $\tilde y = y + u$
# with uniform noise $u$ in $[-\frac12, \frac12]$ (2017, eq. 6; see notebook 2). The second
# optimiser only moves the quantiles, from which the coding tables are made; their loss does not
# depend on the image.

# %%
def train_step(net, optimizer, aux_optimizer, x):
    """One optimisation step on a batch x (B, 3, H, W); returns the scalars of the loss."""
    with autocast(device, "auto"):
        output = net(x)
    losses = criterion(output, x)  # loss = bpp + LMBDA * mse
    optimizer.zero_grad()
    losses["loss"].backward()
    torch.nn.utils.clip_grad_norm_(main_parameters(net).values(), 1.0)
    optimizer.step()
    aux_optimizer.zero_grad()
    net.aux_loss().backward()
    aux_optimizer.step()
    return {name: float(value.detach()) for name, value in losses.items()}


def optimizers(net):
    return make_optimizers(net, "muon", lr=0.002)


def crops(first, last):
    """The batches of steps first, ..., last - 1, in [0, 1]."""
    for x in data.loader(images.crops, first, last, BATCH):
        yield data.to_float(x).contiguous(memory_format=torch.channels_last)


# %% [markdown]
# A rehearsal on a copy of the network measures the time of a step, from which the number of steps
# follows.

# %%
if not SHORT:
    rehearsal = copy.deepcopy(model)
    pair = optimizers(rehearsal)
    for k, x in enumerate(crops(0, 15)):
        if k == 5:
            begin = time.perf_counter()
        train_step(rehearsal, *pair, x)
    seconds = (time.perf_counter() - begin) / 10
    STEPS = max(60, min(STEPS, int(60 * MINUTES / seconds)))
    print(f"{seconds:.3f} s per step")
print(f"{STEPS:,} steps of {BATCH} crops of {CROP}x{CROP}")


# %% [markdown]
# ## Training
#
# At a few moments we code the test image as a decoder would see it: in evaluation mode the network
# rounds, and the rate is $-\log_2 p(\hat y)$, summed over the latents and divided by the pixels.

# %%
def snapshot(step):
    """Rate, distortion and decoded image of the network as it is."""
    model.eval()
    with torch.no_grad():
        output = model(x_test)
    model.train()
    x_hat = data.to_uint8(output["x_hat"][0])
    return {"step": step, "bpp": float(bits(output["likelihoods"]["y"])) / (height * width),
            "psnr": metrics.psnr(original, x_hat), "x_hat": x_hat}


moments = {0, STEPS, *(round(STEPS * share) for share in (0.01, 0.03, 0.1, 0.3, 0.6))}
optimizer, aux_optimizer = optimizers(model)
scheduler = make_scheduler(optimizer, "cosine", STEPS, [])
history, snapshots = [], [snapshot(0)]
for step, x in enumerate(crops(0, STEPS), 1):
    history.append(train_step(model, optimizer, aux_optimizer, x))
    scheduler.step()
    if step in moments:
        snapshots.append(snapshot(step))
        row = snapshots[-1]
        print(f"step {step:5,}: {row['bpp']:.3f} bpp, {row['psnr']:.2f} dB")

# %% [markdown]
# Rate and distortion of the training batches, as running means. Both axes are logarithmic, so the
# beginning is visible.

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.5), layout="constrained")
window = max(1, STEPS // 50)
for axis, key, title in zip(axes, ("loss", "bpp", "mse"),
                            ("loss $R + \\lambda D$", "rate $R$ in bits per pixel",
                             "distortion $D$ (mean squared error, 0 to 255)"), strict=True):
    values = torch.tensor([row[key] for row in history])
    axis.loglog(range(1, STEPS + 1), values, color="0.8")
    smooth = values.unfold(0, window, 1).mean(1)
    axis.loglog(range(window, STEPS + 1), smooth)
    axis.set(title=title, xlabel="step")
plt.show()

# %% [markdown]
# The same in the rate-distortion plane, on the test image. The dashed line is JPEG on this image,
# and the star is the bundled model, which has the same structure but more channels, and was trained
# for longer on more photographs. A network with random weights gives the first
# point; where training moves it next depends on $\lambda$, the exchange rate between bits and
# squared errors: compare the order in which the two curves above fall.

# %%
jpeg = classical.jpeg([path], ms_ssim=False)["results"]
bundled = load(ROOT / "factorized/weights/small-0.0035.pth")
file = image_file.encode_image(bundled, x_test)
x_hat = data.to_uint8(image_file.decode_image(bundled, file))
print(f"bundled model: N, M = {bundled.N}, {bundled.M}, {bundled.provenance.total_steps:,} steps")
figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
axis.plot([s["bpp"] for s in snapshots], [s["psnr"] for s in snapshots], "o-", label="training")
for s in snapshots:
    axis.annotate(f"{s['step']:,}", (s["bpp"], s["psnr"]), xytext=(4, -10),
                  textcoords="offset points")
axis.plot(jpeg["bpp"], jpeg["psnr-rgb"], "k--", label="JPEG")
axis.plot(metrics.bpp(len(file), height, width), metrics.psnr(original, x_hat), "r*", ms=14,
          label="bundled model")
axis.set(xlabel="bits per pixel", ylabel="PSNR in dB", xscale="log", title="after how many steps")
axis.legend()
plt.show()

# %% [markdown]
# And as pictures.

# %%
shown = snapshots[1:] if len(snapshots) > 1 else snapshots
figure, axes = plt.subplots(2, -(-(len(shown) + 1) // 2), figsize=(13, 5.5), layout="constrained")
for axis in axes.flat:
    axis.axis("off")
for axis, s in zip(axes.flat, [*shown, None], strict=False):
    picture = original if s is None else s["x_hat"]
    axis.imshow(picture.permute(1, 2, 0))
    axis.set_title("original" if s is None
                   else f"step {s['step']:,}: {s['bpp']:.2f} bpp, {s['psnr']:.1f} dB")
plt.show()

# %% [markdown]
# ## A real file
#
# Until here, the rate was an estimate, $-\log_2 p(\hat y)$. `update` turns the learned densities
# into integer tables, and rANS codes the latents with them. The file also holds a header and a
# checksum. The two rates agree if the tables cover the latents, which is what the second optimiser
# takes care of; after very few steps they do not yet, and latents outside of them cost more.

# %%
model.eval()
model.update(force=True)
file = image_file.encode_image(model, x_test)
decoded = image_file.decode_image(model, file)
print(f"estimate: {snapshots[-1]['bpp']:.4f} bpp")
print(f"file:     {metrics.bpp(len(file), height, width):.4f} bpp ({len(file):,} bytes)")
print(f"PSNR of the decoded file: {metrics.psnr(original, data.to_uint8(decoded)):.2f} dB")
with torch.no_grad():
    expected = model(x_test)["x_hat"][0].clamp(0, 1)
assert (decoded - expected).abs().max() < 1e-3  # the decoder sees what the network promised

# %% [markdown]
# ## Where the bits go
#
# $p$ is *factorized*: one density per channel, the same at all positions. Each channel therefore
# has its own rate, and training is free to switch a channel off: a channel whose latents all
# round to the same integer costs nearly nothing.

# %%
with torch.no_grad():
    likelihoods = model(x_test)["likelihoods"]["y"]
per_channel = -likelihoods.log2().sum((0, 2, 3)).sort(descending=True).values / (height * width)
active = int((per_channel > 0.01 * per_channel.sum()).sum())
half = int((per_channel.cumsum(0) < per_channel.sum() / 2).sum()) + 1
print(f"{active} of {len(per_channel)} channels take more than 1 % of the rate each;")
print(f"{half} channels take half of it")
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
axis.bar(range(len(per_channel)), per_channel)
axis.set(xlabel="channel, by its rate", ylabel="bits per pixel")
plt.show()

# %% [markdown]
# ## Exercises
#
# Solutions: `1_training_solutions.py`.
#
# **Exercise 1.** Set every latent but one to its median and decode. What does a single latent of
# the channel with the highest rate draw, and one of a channel with a low rate? Use the bundled
# model. Why do these pictures resemble the basis functions of a cosine transform?
#
# **Exercise 2.** Multiply the latents of the bundled model by 0.5 before rounding, and by 2 after
# decoding. How do rate and distortion change, and how far is the new point from the rate-distortion
# curve that JPEG, and the second bundled model, draw? (Notebook 5 makes a codec of this.)
#
# **Exercise 3.** Train with $\lambda$ ten times as large, for a few hundred steps, and compare the
# path in the rate-distortion plane with that of the original $\lambda$.
