"""For tests of common/: CompressAI's smallest models under the contract of a paper's; an image."""

from common import data
from common.coding.contract import Codec

import torch
from compressai import models


class FactorizedPrior(models.FactorizedPrior, Codec):
    tag = b"test"


class ScaleHyperprior(models.ScaleHyperprior, Codec):
    tag = b"test"


def photo(path, height=40, width=48, seed=0):
    """Write a random RGB PNG; returns its pixels (3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    data.write_image(x, path)
    return x
