"""Distortion, curves and complexity, on numbers known beforehand."""

import math

from common import metrics
from common.complexity import complexity

import pytest
import torch
from compressai.models import (
    FactorizedPrior,
    JointAutoregressiveHierarchicalPriors,
    ScaleHyperprior,
)

RATE, PSNR = [0.1, 0.2, 0.4, 0.8, 1.6], [26.0, 28.5, 31.2, 34.0, 37.1]


def test_bpp():
    assert metrics.bpp(49152, 512, 768) == 1.0
    assert metrics.bpp(29, 1, 1) == 232


def test_psnr_by_hand():
    a = torch.zeros(3, 4, 5, dtype=torch.uint8)
    b = a.clone()
    b[1, 2, 3] = 30  # MSE = 900 / 60 = 15
    assert metrics.psnr(a, b) == pytest.approx(10 * math.log10(65025 / 15))
    assert metrics.psnr(b, a) == metrics.psnr(a, b)  # uint8 must not wrap around
    assert metrics.psnr(a, a + 255) == 0
    assert metrics.psnr(a, a) == math.inf


def test_psnr_of_a_batch_is_the_mean_in_db():
    a = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    b = a.clone()
    b[0] += 1
    b[1] += 10
    assert metrics.psnr(a, b) == pytest.approx(10 * math.log10(65025) - 10)


def test_float_images_are_refused():
    with pytest.raises(TypeError, match="round first"):
        metrics.psnr(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4))


def test_ms_ssim():
    torch.manual_seed(0)
    a = torch.randint(0, 256, (3, 161, 170)).to(torch.uint8)
    noisy = (a.int() + torch.randint(-20, 21, a.shape)).clamp(0, 255).to(torch.uint8)
    assert metrics.ms_ssim(a, a) == pytest.approx(1, abs=1e-6)
    assert 0.9 < metrics.ms_ssim(a, noisy) < 0.999
    batch = metrics.ms_ssim(torch.stack([a, a]), torch.stack([a, noisy]))
    assert batch == pytest.approx((1 + metrics.ms_ssim(a, noisy)) / 2, abs=1e-6)
    assert math.isnan(metrics.ms_ssim(a[:, :160], a[:, :160]))


def test_interpolate():
    for rate, psnr in zip(RATE, PSNR, strict=True):
        assert metrics.interpolate(RATE, PSNR, rate) == pytest.approx(psnr)
    line = [10 * math.log10(r) for r in RATE]  # straight over log rate: reproduced exactly
    assert metrics.interpolate(RATE, line, 0.3) == pytest.approx(10 * math.log10(0.3))
    assert metrics.interpolate(RATE[::-1], line[::-1], 0.3) == pytest.approx(10 * math.log10(0.3))
    assert metrics.interpolate(RATE, PSNR, 0.099) is None
    assert metrics.interpolate(RATE, PSNR, 1.601) is None
    assert metrics.interpolate([0.3], [30.0], 0.3) is None


def test_bd_rate():
    assert metrics.bd_rate(RATE, PSNR, RATE, PSNR) == pytest.approx(0, abs=1e-9)
    half = [r / 2 for r in RATE]
    assert metrics.bd_rate(RATE, PSNR, half, PSNR) == pytest.approx(-50)
    assert metrics.bd_rate(half, PSNR, RATE, PSNR) == pytest.approx(100)
    order = [3, 0, 4, 1, 2]
    shuffled = [half[i] for i in order], [PSNR[i] for i in order]
    assert metrics.bd_rate(RATE, PSNR, *shuffled) == pytest.approx(-50)
    # two points of our own against many, as with the bundled weights
    assert metrics.bd_rate(RATE, [10 * math.log10(r) for r in RATE], [0.15, 0.5],
                           [10 * math.log10(r) for r in (0.3, 1.0)]) == pytest.approx(-50)


def test_bd_rate_without_common_range():
    assert metrics.bd_rate(RATE, PSNR, RATE, [p + 20 for p in PSNR]) is None
    assert metrics.bd_rate(RATE, PSNR, [0.3], [30.0]) is None
    assert metrics.bd_rate(RATE, PSNR, [0.3, 0.6], [30.0, 30.0]) is None


@pytest.mark.parametrize(("kind", "N", "M", "total", "thop", "giga"), [
    (FactorizedPrior, 128, 192, 2_998_147, 2_887_363, (28.941, 72.352, 4.228, 0)),
    (FactorizedPrior, 192, 320, 7_030_531, None, (64.173, 160.432, 9.513, 0)),
    (ScaleHyperprior, 128, 192, 5_075_843, 4_968_963, (30.013, 74.014, 4.228, 0)),
    (ScaleHyperprior, 192, 320, 11_816_323, None, (66.756, 164.343, 9.513, 0)),
    (JointAutoregressiveHierarchicalPriors, 192, 192, 14_130_467, 12_052_835,
     (66.946, 162.232, 9.513, 2.831)),
])
def test_complexity(kind, N, M, total, thop, giga):
    """Published parameter counts and MACs of one 512x768 image, to the printed digits."""
    model = kind(N, M)
    found = complexity(model)
    assert found["params_total"] == total
    assert thop is None or found["params_thop"] == thop
    keys = ("macs_true", "macs_thop", "macs_gdn", "macs_masked")
    assert tuple(round(found[k] / 1e9, 3) for k in keys) == giga
    assert model.training and not model.g_a[0]._forward_hooks  # the model itself is untouched


def test_complexity_counts_the_model_s_own_parameters():
    model = ScaleHyperprior(4, 6)
    model.gain = torch.nn.Parameter(torch.ones(8))  # belongs to no child
    total = complexity(model, (64, 64))["params_total"]
    assert total == sum(p.numel() for p in model.parameters())


def test_complexity_grows_with_the_image():
    model = FactorizedPrior(8, 12)
    small, large = complexity(model, (64, 64)), complexity(model, (128, 192))
    assert large["macs_true"] == 6 * small["macs_true"]
    assert large["params_total"] == small["params_total"]
