"""For tests of common/: CompressAI's smallest models under the contract of a paper's; an image."""

from common import data
from common.coding.contract import Codec

import forks
import torch
from compressai import models
from forks import ROOT
from PIL import Image

HOLDER = """
import signal, sys
from common import UserError, locks
try:
    locks.lock(sys.argv[2], "take another folder")
except UserError as e:
    print(e, flush=True)
    sys.exit()
print("locked", flush=True)
signal.pause()
"""


class FactorizedPrior(models.FactorizedPrior, Codec):
    tag = b"test"


class ScaleHyperprior(models.ScaleHyperprior, Codec):
    tag = b"test"


def cut_kodak(folder, counts, width, height):
    """Write crops of a Kodak image, `counts` of them in each subfolder: {"train": 2, "test": 1}."""
    with Image.open(data.KODAK / "kodim23.png") as kodak:
        for sub, count in counts.items():
            (folder / sub).mkdir()
            for i in range(count):
                box = (200 + 90 * i, 100, 200 + 90 * i + width, 100 + height)
                kodak.crop(box).save(folder / sub / f"{i}.png")
    return folder


def locking_process(folder):
    """A process that locks a folder until it is killed; and "locked", or why it could not."""
    process = forks.start("-c", HOLDER, folder, cwd=ROOT)
    return process, process.first_line()


def factorized_model():
    """A small codec that can code: random weights with their CDF tables."""
    torch.manual_seed(0)
    net = FactorizedPrior(8, 12).eval()
    net.update()
    return net


def photo(path, height=40, width=48, seed=0):
    """Write a random RGB PNG; returns its pixels (3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    data.write_image(x, path)
    return x
