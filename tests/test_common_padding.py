"""Images of odd sizes are continued to multiples of the codec's step, at few bits."""

import math

from common import data
from common.coding import image_file
from common.evaluation import padding

import pytest
import torch
from helpers import FactorizedPrior


@pytest.mark.parametrize("size", [(1, 1), (1, 33), (16, 32), (17, 15), (50, 70)])
def test_pad_and_crop(size):
    x = torch.rand(2, 3, *size)
    padded = image_file.pad(x, 16)
    assert [s % 16 for s in padded.shape[-2:]] == [0, 0]
    assert all(0 <= p - s < 16 for p, s in zip(padded.shape[-2:], size, strict=True))
    assert torch.equal(image_file.crop(padded, size), x)


@pytest.mark.parametrize("size", [(16, 32), (64, 16)])
def test_images_of_whole_multiples_are_not_padded(size):
    x = torch.rand(2, 3, *size)
    assert torch.equal(image_file.pad(x, 16), x)


def test_the_border_is_continued_without_its_detail():
    """A cosine on the last row fades by exp(-frequency / 2) per row; the mean remains."""
    columns = torch.arange(48)
    last = sum(a * torch.cos(torch.pi * k / 48 * (columns + 0.5))
               for a, k in ((0.5, 0), (0.2, 3), (0.1, 47)))
    x = torch.rand(1, 3, 20, 48)
    x[..., -1, :] = last
    below = image_file.pad(x, 24)[..., 20:, :]
    for n in range(4):
        expected = sum(a * math.exp(-torch.pi * k / 48 / 2 * (n + 1))
                       * torch.cos(torch.pi * k / 48 * (columns + 0.5))
                       for a, k in ((0.5, 0), (0.2, 3), (0.1, 47)))
        assert torch.allclose(below[0, :, n], expected.expand(3, 48), atol=1e-6)
    turned = image_file.pad(x.mT, 24)[..., 20:]  # and so do columns
    assert torch.allclose(turned, below.mT, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (33, 65), (97, 64)])
def test_the_continuation_stays_within_the_values_of_the_border(size):
    x = torch.rand(1, 3, *size)
    padded = image_file.pad(x, 64)
    assert padded.min() > x.min() - 1e-6 and padded.max() < x.max() + 1e-6
    assert torch.allclose(image_file.pad(torch.full_like(x, 0.3), 64), torch.tensor(0.3))
    half = image_file.pad(x.to(torch.bfloat16), 64)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), padded, atol=0.01)


def test_padding_is_measured_on_files():
    torch.manual_seed(0)
    model = FactorizedPrior(8, 12).eval()
    model.update()
    images = list(padding.crops(9, 40))
    assert [x.shape for x in images] == [(3, 9, 40)] * 4
    assert [x.shape for x in padding.crops(1, 3000)] == [(3, 1, 3000)]
    assert [x.shape for x in padding.crops(700, 1)] == [(3, 700, 1)]
    sizes = [len(image_file.encode_image(model, data.to_float(x))) for x in images]
    text = padding.cost(model, (9, 40), 0.01)
    assert f"> {sum(sizes) / 4:.0f} bytes" in text and text.endswith(" %")
    assert padding.cost(model, (16, 32), 0.01).endswith("cost +0.0 %")  # nothing to pad
