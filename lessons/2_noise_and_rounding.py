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
# # 2. Noise against straight-through rounding
#
# Papers: Ballé, Laparra, Simoncelli, ICLR 2017
# ([arXiv:1611.01704](https://arxiv.org/abs/1611.01704)), Section 3, for the noise; L. Theis,
# W. Shi, A. Cunningham, F. Huszár, ICLR 2017
# ([arXiv:1703.00395](https://arxiv.org/abs/1703.00395)), Section 2.1, for the straight-through
# gradient; D. Minnen, S. Singh, ICIP 2020 ([arXiv:2007.08739](https://arxiv.org/abs/2007.08739)),
# for the mixture of both. Code: `factorized/model.py`.
#
# Rounding has the derivative 0 almost everywhere, so it cannot be trained through. There are two
# ways out:
#
# - **noise**: $\tilde y = y + u$ with $u$ uniform in $[-\frac12, \frac12]$, in place of
#   $\hat y = \operatorname{round}(y)$;
# - **straight-through**: round in the forward pass, and use 1 as the derivative of rounding in the
#   backward pass.
#
# We look at what each of them does to the rate, to the distortion, to the gradient of one latent,
# and to training.

# %%
import copy
import os

from common import data, metrics
from common.coding import image_file
from common.loss import RateDistortionLoss, bits
from common.papers import ROOT
from common.training.images import find_images
from common.training.optimizers import main_parameters

import matplotlib.pyplot as plt
import torch
from compressai.ops import quantize_ste

from factorized.model import load

SHORT = os.environ.get("SHORT") == "1"  # SHORT=1: a few steps, to try the notebook
STEPS = 3 if SHORT else 60  # of each training below
BATCH, CROP = (2, 64) if SHORT else (8, 128)
LMBDA = 0.013
torch.manual_seed(0)

model = load(ROOT / f"factorized/weights/small-{LMBDA}.pth")

# %% [markdown]
# ## The rate of one latent
#
# If $y$ has the cumulative distribution $F$, then the rounded latent has the probabilities
#
# $$ P(\hat y = k) = F(k + \tfrac12) - F(k - \tfrac12), $$
#
# and the noisy one has the density
#
# $$ p_{\tilde y}(t) = F(t + \tfrac12) - F(t - \tfrac12), $$
#
# the convolution of the density of $y$ with a box. They are the same function: the density of
# $\tilde y$, read at the integers, is the distribution of $\hat y$. A model that is trained on
# $\tilde y$ can therefore code $\hat y$.

# %%
def box(t, mean, scale):
    """F(t + 1/2) - F(t - 1/2) of a Gaussian."""
    gaussian = torch.distributions.Normal(mean, scale)
    return gaussian.cdf(t + 0.5) - gaussian.cdf(t - 0.5)


t = torch.linspace(-4, 4, 801, dtype=torch.float64)
k = torch.arange(-4, 5, dtype=torch.float64)
figure, axes = plt.subplots(1, 2, figsize=(12, 3.5), layout="constrained")
axes[0].plot(t, box(t, 0.3, 0.7), label="density of $\\tilde y = y + u$")
axes[0].stem(k, box(k, 0.3, 0.7), linefmt="C1-", markerfmt="C1o", basefmt=" ",
             label="probabilities of $\\hat y = $ round$(y)$")
axes[0].set(title="$y$ Gaussian, mean 0.3, standard deviation 0.7", xlabel="value")
axes[0].legend()


def entropies(mean, scale):
    """(entropy of round(y), differential entropy of y + u), in bits."""
    k = torch.arange(-60, 61, dtype=torch.float64)
    t = torch.linspace(-60, 60, 60_001, dtype=torch.float64)
    P, p = (box(v, mean, scale).clamp_min(1e-300) for v in (k, t))
    return float(-(P * P.log2()).sum()), float(-(p * p.log2()).sum() * (t[1] - t[0]))


scales = torch.logspace(-1.5, 1, 40).tolist()
for mean, style in ((0.0, "-"), (0.5, "--")):
    pairs = [entropies(mean, scale) for scale in scales]
    axes[1].semilogx(scales, [a for a, _ in pairs], "C1" + style, label=f"rounded, mean {mean}")
    axes[1].semilogx(scales, [b for _, b in pairs], "C0" + style, label=f"noisy, mean {mean}")
axes[1].set(title="bits of a latent", xlabel="standard deviation of $y$")
axes[1].legend()
plt.show()

print("deviation  mean   rounded  noisy (bits)")
for scale in (0.05, 0.3, 1.0, 3.0):
    for mean in (0.0, 0.5):
        print(f"{scale:9} {mean:5}   {entropies(mean, scale)[0]:7.4f}  "
              f"{entropies(mean, scale)[1]:7.4f}")
assert abs(entropies(0.5, 3.0)[0] - entropies(0.5, 3.0)[1]) < 1e-3

# %% [markdown]
# For a wide latent, both entropies are the same. For a narrow one they are not, and the error
# depends on where the mean lies between the integers, which the noise does not notice: at mean 0
# noise costs more than rounding, and at mean 0.5 less, as rounding then draws between two integers.
#
# ## Rate and distortion of a trained model
#
# The bundled model was trained with noise. In training mode it adds noise, and in evaluation mode
# it rounds, around the median of each channel. The third row is the size of real files.

# %%
names = ["kodim23"] if SHORT else ["kodim05", "kodim15", "kodim23"]
pictures = [data.read_image(data.KODAK / f"{name}.png") for name in names]
if SHORT:
    pictures = [x[:, 128:256, 256:448] for x in pictures]


@torch.no_grad()
def measure(net, training):
    """Mean bpp and PSNR of the pictures, with noise or with rounding."""
    rows = []
    net.train(training)
    for picture in pictures:
        x = data.to_float(picture)[None]
        output = net(x)
        rows.append((float(bits(output["likelihoods"]["y"])) / x[0, 0].numel(),
                     metrics.psnr(picture, data.to_uint8(output["x_hat"][0]))))
    net.eval()
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


files = [image_file.encode_image(model, data.to_float(x)) for x in pictures]
decoded = [image_file.decode_image(model, file) for file in files]
real = [(metrics.bpp(len(file), *x.shape[-2:]), metrics.psnr(x, data.to_uint8(x_hat)))
        for file, x, x_hat in zip(files, pictures, decoded, strict=True)]
rows = {"noise": measure(model, True), "rounding": measure(model, False),
        "files": [sum(column) / len(real) for column in zip(*real, strict=True)]}
print("             bpp    PSNR")
for name, (bpp, psnr) in rows.items():
    print(f"{name:10} {bpp:.4f}  {psnr:.2f} dB")
assert abs(rows["rounding"][1] - rows["files"][1]) < 0.02

# %% [markdown]
# What training saw (the first row) is not what a file has (the last): the noise overestimates the
# rate, as in the plot above for narrow latents around 0, of which this model has many. The
# distortion is nearly the same, although a latent that is always rounded to 0 reaches the decoder
# as a number between $-\frac12$ and $\frac12$ in training: the decoder has learned to expect that.

# %%
with torch.no_grad():
    y = model.g_a(data.to_float(pictures[0])[None])[0]  # (M, h, w)
deviation = y.flatten(1).std(1)
print(f"standard deviation of a channel: median {deviation.median():.2f}, "
      f"largest {deviation.max():.1f}; {int((deviation < 0.5).sum())} of {len(deviation)} "
      "channels are below 0.5")

# %% [markdown]
# ## The gradient of one latent
#
# Take one latent $y_i$ and let all others be rounded. Let $\ell(t)$ be the loss when the decoder
# gets the real number $t$ in its place (in bits, for the whole crop):
#
# $$ \ell(t) = -\log_2 p(t)
#    + \lambda \cdot 255^2 \cdot \tfrac13 \lVert x - g_s(\ldots, t, \ldots) \rVert^2 . $$
#
# The three objectives are
#
# - rounding: $\ell(\operatorname{round}(y_i))$, with the gradient 0;
# - straight-through: the same, with the gradient $\ell'(\operatorname{round}(y_i))$;
# - noise, in expectation: $\int_{-1/2}^{1/2} \ell(y_i + u)\, du$, with the gradient
#   $\ell(y_i + \frac12) - \ell(y_i - \frac12)$.
#
# The gradient of noise is the difference of two values of the loss, half a step to the right and
# half a step to the left: if $y_i + \frac12$ and $y_i - \frac12$ are integers, it is exactly the
# change of the true loss between them. The straight-through gradient is a slope at an integer,
# constant in between.

# %%
crop = data.to_float(pictures[0][:, :128, :128])[None]
half = 8  # values of t per half a unit
per_unit = 2 * half
with torch.no_grad():
    y = model.g_a(crop)
    y_hat = y.round()
    channel = int(y.flatten(2).std(2)[0].argmax())
    i, j = (int(v) for v in divmod(int(y[0, channel].abs().argmax()), y.size(3)))
    centre = float(y_hat[0, channel, i, j])
    t = centre + torch.arange(-5 * half, 5 * half + 1) / per_unit  # 2.5 units on each side
    likelihoods = []
    distortions = []
    for part in t.split(16):
        batch = y_hat.repeat(len(part), 1, 1, 1)
        batch[:, channel, i, j] = part
        distortions.append((crop - model.g_s(batch)).square().sum((1, 2, 3)) / 3)
        values = torch.zeros(1, y.size(1), len(part))
        values[0, channel] = part
        # density of channel `channel` at t; CompressAI has no public name for it
        p = model.entropy_bottleneck._likelihood(values.permute(1, 0, 2))[0]
        likelihoods.append(p[channel, 0])
ell = -torch.cat(likelihoods).log2() + LMBDA * 255**2 * torch.cat(distortions)
ell -= ell.min()
windows = ell.unfold(0, per_unit + 1, 1)  # from t - 1/2 to t + 1/2, at 2 units on each side
expectation = torch.trapezoid(windows, dx=1 / per_unit)[half:-half]
difference = (windows[:, -1] - windows[:, 0])[half:-half]
inner = slice(per_unit, -per_unit)  # 1.5 units on each side
at = ((torch.round(t[inner]) - t[0]) * per_unit).long()
slope = (ell[at + 1] - ell[at - 1]) * per_unit / 2

figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
axes[0].plot(t, ell, color="0.7", label="$\\ell(t)$, without quantisation")
axes[0].step(t[inner], ell[at], where="mid", color="C1", label="rounding")
axes[0].plot(t[inner], expectation, color="C0", label="noise, in expectation")
axes[0].set(title="loss in bits, above its minimum", xlabel="$y_i$")
axes[1].plot(t[inner], difference, color="C0", label="noise")
axes[1].step(t[inner], slope, where="mid", color="C1", label="straight-through")
axes[1].axhline(0, color="0.7", lw=0.8)
axes[1].set(title="gradient in bits per unit", xlabel="$y_i$")
for axis in axes:
    axis.legend()
plt.show()

# %% [markdown]
# ## Training with each of them
#
# From the bundled weights, we train for a few steps more with the quantisers below, on the same
# crops with the same learning rate, and then measure all of them with rounding, as in files.
# *mixed* is the proposal of Minnen and Singh: noise for the rate, and rounding, with the
# straight-through gradient, for the decoder.

# %%
def forward(net, x, quantiser):
    """As `Factorized.forward`, with another quantiser in training."""
    y = net.g_a(x)
    medians = net.entropy_bottleneck.quantiles[:, 0, 1].detach()[:, None, None]
    rounded = quantize_ste(y - medians) + medians
    y_tilde, likelihoods = net.entropy_bottleneck(y)  # with noise
    if quantiser == "straight-through":
        rows = rounded.transpose(0, 1).reshape(y.size(1), 1, -1)
        likelihoods = net.entropy_bottleneck._likelihood(rows)[0].clamp_min(1e-9)
    x_hat = net.g_s(y_tilde if quantiser == "noise" else rounded)
    return {"x_hat": x_hat, "likelihoods": {"y": likelihoods}}


images = find_images(None, CROP, seed=1, flip=True, history=None, quiet=True)
criterion = RateDistortionLoss(LMBDA)


def train(quantiser):
    net = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(main_parameters(net).values(), lr=1e-5)
    torch.manual_seed(0)
    for x in data.loader(images.crops, 0, STEPS, BATCH):
        x = data.to_float(x)
        loss = criterion(forward(net, x, quantiser), x)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(main_parameters(net).values(), 1.0)
        optimizer.step()
    return net


def true_loss(bpp, psnr):
    """R + LMBDA * D with the mean squared error that belongs to the (mean) PSNR."""
    return bpp + LMBDA * 255**2 / 10 ** (psnr / 10)


results = {"as bundled": measure(model, False)}
for quantiser in ("noise", "mixed", "straight-through"):
    results[quantiser] = measure(train(quantiser), False)
print(f"measured with rounding, after {STEPS} steps")
print("                    bpp    PSNR      loss")
for name, (bpp, psnr) in results.items():
    print(f"{name:16} {bpp:.4f}  {psnr:.2f} dB  {true_loss(bpp, psnr):.4f}")

# %% [markdown]
# Compare the lines with the first one: *mixed* lets the decoder see rounded latents, which are what
# it gets from a file; the rate keeps the gradient of the noise. Which line has the lowest loss, and
# does the gain come from the rate or from the distortion?
#
# ## Exercises
#
# Solutions: `2_noise_and_rounding_solutions.py`.
#
# **Exercise 1.** Round without a straight-through gradient (`torch.round`) in the decoder's path,
# and keep the noise in the rate. Which part of the network still gets a gradient of the
# distortion? Measure the norms of the gradients of $g_a$ and $g_s$ for one batch.
#
# **Exercise 2.** Train only $g_s$ on rounded latents, with everything else frozen: then the files
# stay as they are. How much PSNR is won, and how much is won by as many steps on noisy latents? Why
# would the difference of the two shrink at a higher rate?
#
# **Exercise 3.** The noise in training is drawn anew in each step. Measure the standard deviation
# of the gradient of one kernel of $g_a$ over several draws for the same batch, relative to its
# mean, with `noise` and with `mixed`. Where does the remaining randomness of `mixed` come from?
