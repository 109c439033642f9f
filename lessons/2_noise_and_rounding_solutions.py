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
# # Solutions of notebook 2: noise against straight-through rounding

# %%
import copy
import os

from common import data, metrics
from common.loss import RateDistortionLoss
from common.papers import ROOT
from common.training.images import find_images

import torch
from compressai.ops import quantize_ste

from factorized.model import load

SHORT = os.environ.get("SHORT") == "1"  # SHORT=1: a few steps, to try the notebook
STEPS = 3 if SHORT else 60
BATCH, CROP = (2, 64) if SHORT else (8, 128)
LMBDA = 0.013

model = load(ROOT / f"factorized/weights/small-{LMBDA}.pth")
medians = model.entropy_bottleneck.quantiles[:, 0, 1].detach()[:, None, None]
images = find_images(None, CROP, seed=1, flip=True, history=None, quiet=True)
batches = [data.to_float(x) for x in data.loader(images.crops, 0, STEPS, BATCH)]
criterion = RateDistortionLoss(LMBDA)


def forward(net, x, rounding):
    """Noise in the rate; in the decoder, `rounding` of the latents around their medians."""
    y = net.g_a(x)
    y_tilde, likelihoods = net.entropy_bottleneck(y)
    y_hat = y_tilde if rounding is None else rounding(y - medians) + medians
    return {"x_hat": net.g_s(y_hat), "likelihoods": {"y": likelihoods}}


# %% [markdown]
# ## Exercise 1: rounding without a gradient
#
# `torch.round` has the derivative 0, so the distortion trains $g_s$ alone. $g_a$ still gets the
# gradient of the rate, which wants it to make all latents constant.

# %%
def norms(rounding, term):
    """Norm of the gradient of "bpp" or "mse" with respect to g_a and g_s."""
    net = copy.deepcopy(model).train()
    torch.manual_seed(0)
    criterion(forward(net, batches[0], rounding), batches[0])[term].backward()
    return [float(torch.stack([p.grad.norm() for p in part.parameters() if p.grad is not None]
                              or [torch.zeros(())]).norm()) for part in (net.g_a, net.g_s)]


print("rounding           term     g_a        g_s")
for name, rounding in (("torch.round", torch.round), ("straight-through", quantize_ste)):
    for term in ("bpp", "mse"):
        g_a, g_s = norms(rounding, term)
        print(f"{name:18} {term}  {g_a:9.3g}  {g_s:9.3g}")
assert norms(torch.round, "mse")[0] == 0 < norms(quantize_ste, "mse")[0]

# %% [markdown]
# ## Exercise 2: train the decoder only
#
# $g_a$ and the densities are frozen, so every file stays as it is, byte for byte, and only $g_s$
# learns what rounded latents look like. The gain is small, and a part of it is not due to rounding:
# a decoder that is trained for as many steps on noisy latents gains, too. What is left is smaller
# at the higher rate: there, latents spread over more integers, and rounding is more like a uniform
# noise.

# %%
picture = data.read_image(data.KODAK / "kodim15.png")
if SHORT:
    picture = picture[:, 128:256, 256:448]


@torch.no_grad()
def psnr(net):
    x_hat = net.eval()(data.to_float(picture)[None])["x_hat"][0]
    return metrics.psnr(picture, data.to_uint8(x_hat.clamp(0, 1)))


def train_g_s(model, rounding):
    """A copy of the model after a few steps of g_s, on rounded or on noisy latents."""
    net = copy.deepcopy(model).train()
    medians = net.entropy_bottleneck.quantiles[:, 0, 1].detach()[:, None, None]
    optimizer = torch.optim.Adam(net.g_s.parameters(), lr=1e-5)
    torch.manual_seed(0)
    for x in batches:
        with torch.no_grad():
            y = net.g_a(x)
            y_hat = ((y - medians).round() + medians if rounding
                     else y + torch.empty_like(y).uniform_(-0.5, 0.5))
        loss = (net.g_s(y_hat) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


print(f"PSNR of kodim15 in dB, and what {STEPS} steps of g_s add to it")
print("lmbda   as bundled  rounded   noisy  difference")
for lmbda, net in ((0.0035, load(ROOT / "factorized/weights/small-0.0035.pth")), (LMBDA, model)):
    before = psnr(net)
    rounded, noisy = (psnr(train_g_s(net, rounding)) - before for rounding in (True, False))
    print(f"{lmbda:<6} {before:11.3f} {rounded:8.3f} {noisy:7.3f} {rounded - noisy:11.3f}")

# %% [markdown]
# ## Exercise 3: the randomness of the gradient
#
# The same batch several times, with new noise. With `mixed`, the gradient of the distortion is the
# same each time, as rounding draws nothing; what remains is the noise in the rate.

# %%
print("quantiser  term  deviation of the gradient, relative to its mean")
spread = {}
for name, rounding in (("noise", None), ("mixed", quantize_ste)):
    for term in ("bpp", "mse"):
        net = copy.deepcopy(model).train()
        gradients = []
        for seed in range(3 if SHORT else 8):
            torch.manual_seed(seed)
            net.zero_grad()
            criterion(forward(net, batches[0], rounding), batches[0])[term].backward()
            gradients.append(net.g_a[0].weight.grad.flatten().clone())
        stacked = torch.stack(gradients)
        spread[name, term] = float(stacked.std(0).norm() / stacked.mean(0).norm())
        print(f"{name:9}  {term}   {spread[name, term]:.4f}")
assert spread["mixed", "mse"] < 1e-3 < spread["noise", "mse"]
