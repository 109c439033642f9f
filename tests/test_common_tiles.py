"""Tiles give what the whole image gives."""

from common.coding.tiles import tiled

import pytest
import torch
from compressai.models import FactorizedPrior

import hyperprior.model
from hyperprior.model import Hyperprior


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return FactorizedPrior(16, 24).eval()


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 16 * 19, 16 * 23, generator=torch.Generator().manual_seed(1))


def run(transform, x, **options):
    with torch.no_grad():
        return tiled(transform, x, tile=64, limit=0, **options)


@pytest.mark.parametrize("halo", [2, 4])
def test_analysis_and_synthesis_equal_the_whole_image(model, image, halo):
    with torch.no_grad():
        y = model.g_a(image)
        x_hat = model.g_s(y)
    assert torch.allclose(run(model.g_a, image, down=16, halo=halo), y, atol=1e-5)
    assert torch.allclose(run(model.g_s, y, up=16, halo=halo), x_hat, atol=1e-5)


@pytest.mark.parametrize("halo", [0, 1])
def test_a_smaller_halo_is_not_enough(model, image, halo):
    with torch.no_grad():
        y = model.g_a(image)
        x_hat = model.g_s(y)
    assert (run(model.g_a, image, down=16, halo=halo) - y).abs().max() > 1e-4
    assert (run(model.g_s, y, up=16, halo=halo) - x_hat).abs().max() > 1e-4


def test_tiles_only_above_the_limit(model, image):
    sizes = []

    def transform(x):
        sizes.append(tuple(x.shape[-2:]))
        return model.g_a(x)

    with torch.no_grad():
        tiled(transform, image, down=16, limit=16 * 19 * 16 * 23)
        assert sizes == [(16 * 19, 16 * 23)]
        sizes.clear()
        tiled(transform, image, down=16, tile=64, limit=16 * 19 * 16 * 23 - 1)
    assert len(sizes) == 5 * 6
    assert max(h for h, _ in sizes) == max(w for _, w in sizes) == 64 + 2 * 32


def test_the_limit_counts_image_pixels_when_going_up(model):
    y = torch.zeros(1, 24, 4, 4)
    sizes = []

    def transform(x):
        sizes.append(tuple(x.shape[-2:]))
        return model.g_s(x)

    with torch.no_grad():
        x_hat = tiled(transform, y, up=16, tile=32, limit=64 * 64 - 1)
    assert len(sizes) == 4 and x_hat.shape == (1, 3, 64, 64)


def test_a_batch_and_one_row_of_latents(model):
    x = torch.rand(2, 3, 16, 16 * 9, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        y = model.g_a(x)
    assert torch.allclose(run(model.g_a, x, down=16), y, atol=1e-5)


def test_exact_layers_in_tiles_give_the_same_bits(monkeypatch):
    """hyperprior computes h_s of a large image in tiles; the halo of two positions is needed."""
    torch.manual_seed(0)
    model = Hyperprior(8, 6)
    model.update()
    with torch.no_grad():
        for weight in model.h_s.parameters():
            weight.mul_(2).add_(0.05)
    z_hat = torch.randint(-9, 10, (1, 8, 13, 11)).float()
    whole = model._indexes(z_hat)
    assert len(whole.unique()) > 20

    def in_tiles(halo):
        monkeypatch.setattr(hyperprior.model, "tiled", lambda f, x, **options: tiled(
            f, x, **(options | {"limit": 0, "tile": 16, "halo": halo})))
        return model._indexes(z_hat)

    assert torch.equal(in_tiles(2), whole) and not torch.equal(in_tiles(1), whole)
