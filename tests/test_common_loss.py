"""Rate-distortion losses against values worked out by hand."""

import math

from common import UserError
from common.loss import RateDistortionLoss, bits

import pytest
import torch
from pytorch_msssim import ms_ssim


def output(x, error=0.1, y=0.5, z=0.25):
    """x_hat off by `error`; 8x8x8 latents y and 4x2x2 latents z of constant probability."""
    latents = {"y": torch.full((len(x), 8, 8, 8), y), "z": torch.full((len(x), 4, 2, 2), z)}
    return {"x_hat": x + error, "likelihoods": latents}


@pytest.fixture
def x():
    return 0.9 * torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))


def test_mse_form(x):
    """y costs 512 bits and z 16 * 2 bits an image; the squared error is 0.1^2."""
    terms = RateDistortionLoss(0.01)(output(x), x)
    assert set(terms) == {"loss", "bpp", "bpp_y", "bpp_z", "mse"}
    assert terms["bpp_y"].item() == pytest.approx(512 / 65536)
    assert terms["bpp_z"].item() == pytest.approx(32 / 65536)
    assert terms["bpp"].item() == pytest.approx(544 / 65536)
    assert terms["mse"].item() == pytest.approx(650.25, rel=1e-4)
    assert terms["loss"].item() == pytest.approx(544 / 65536 + 6.5025, rel=1e-4)
    assert all(v.shape == () and v.dtype == torch.float32 for v in terms.values())


def test_one_latent(x):
    one = output(x)
    del one["likelihoods"]["z"]
    terms = RateDistortionLoss(0.01)(one, x)
    assert set(terms) == {"loss", "bpp", "bpp_y", "mse"}
    assert terms["bpp"] == terms["bpp_y"]


def test_ms_ssim_form(x):
    """Constant images differ in luminance only, at the coarsest scale: l ** 0.1333."""
    flat = torch.full_like(x, 0.2)
    terms = RateDistortionLoss(8.0, "ms-ssim")(output(flat, 0.2), flat)
    luminance = (2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4)
    assert terms["ms_ssim"].item() == pytest.approx(luminance**0.1333, rel=1e-4)
    expected = 544 / 65536 + 8 * (1 - luminance**0.1333)
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-3)
    assert terms["mse"].item() == pytest.approx(255**2 * 0.04, rel=1e-4)

    noisy = output(x, 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    terms = RateDistortionLoss(8.0, "ms-ssim")(noisy, x)
    similarity = ms_ssim(noisy["x_hat"], x, data_range=1.0)
    assert 0.1 < similarity < 0.999
    assert terms["loss"].item() == pytest.approx((terms["bpp"] + 8 * (1 - similarity)).item())


def test_beta_form(x):
    """D + beta * R counts the bits of one image, not of the batch and not per pixel."""
    assert RateDistortionLoss(beta=0.5)(output(x), x)["loss"].item() == pytest.approx(
        650.25 + 0.5 * 544, rel=1e-4)


@pytest.mark.parametrize("beta", [0.001, 0.05])
def test_beta_is_lmbda_of_one_crop(x, beta):
    """With lmbda = 1 / (65536 beta) on 256x256 crops, the loss is 65536 beta times the other."""
    lmbda = 1 / (65536 * beta)
    for args in [{}, {"error": 0.01}, {"y": 0.01}]:
        of_beta = RateDistortionLoss(beta=beta)(output(x, **args), x)["loss"]
        of_lmbda = RateDistortionLoss(lmbda)(output(x, **args), x)["loss"]
        assert of_beta.item() == pytest.approx(65536 * beta * of_lmbda.item(), rel=1e-5)


def test_bits_of_bf16_are_summed_in_float32():
    """0.7109375 is exact in bf16, neither its logarithm nor the sum is."""
    p = torch.full((100_000,), 0.7109375, dtype=torch.bfloat16)
    total = bits(p)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(-100_000 * math.log2(0.7109375), rel=1e-5)


def test_bf16_reconstruction_is_compared_in_float32(x):
    result = output(x)
    result["x_hat"] = result["x_hat"].bfloat16()
    terms = RateDistortionLoss(0.01)(result, x)
    exact = 255**2 * (result["x_hat"].double() - x).square().mean().item()
    assert terms["mse"].dtype == torch.float32
    assert terms["mse"].item() == pytest.approx(exact, rel=1e-5)
    terms = RateDistortionLoss(1.0, "ms-ssim")(result, x)
    similarity = ms_ssim(result["x_hat"].float(), x, data_range=1.0)
    assert terms["ms_ssim"].dtype == torch.float32 and terms["ms_ssim"] == similarity


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
def test_gradients(x, metric):
    """The rate pushes likelihoods up, the distortion pushes x_hat towards x."""
    result = output(x)
    leaves = [result["x_hat"].requires_grad_(),
              *(p.requires_grad_() for p in result["likelihoods"].values())]
    RateDistortionLoss(0.01, metric)(result, x)["loss"].backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert all((p.grad < 0).all() for p in result["likelihoods"].values())
    assert leaves[0].grad.mean() > 0


@pytest.mark.parametrize("args, word", [
    ({"lmbda": 1.0, "metric": "psnr"}, "psnr"), ({}, "exactly one"),
    ({"lmbda": 1.0, "beta": 1.0}, "exactly one"),
    ({"metric": "ms-ssim", "beta": 1.0}, "lmbda")])
def test_mistakes(args, word):
    with pytest.raises(UserError, match=word):
        RateDistortionLoss(**args)


def test_ms_ssim_needs_161_pixels(x):
    criterion = RateDistortionLoss(1.0, "ms-ssim")
    fits = x[..., :161]
    assert criterion(output(fits), fits)["loss"].isfinite()
    small = x[..., :160]
    with pytest.raises(UserError, match="160x256"):
        criterion(output(small), small)
