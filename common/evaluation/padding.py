"""Measure what the padding of odd sizes costs: `image_file.pad` against repeated border pixels.

    python -m common.evaluation.padding [PAPER ...] [--lmbda 0.0067]
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

from common import cli, data, metrics
from common.coding import bitstream
from common.coding.contract import Codec
from common.coding.image_file import decode_images, pack_images, pad
from common.papers import ROOT, papers

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = [(1, 3000), (700, 1), (9, 700), (33, 47), (65, 65), (127, 129), (333, 449)]
IMAGES = [data.KODAK / f"kodim{number}.png" for number in ("05", "13", "23", "16")]


def repeated(x: Tensor, multiple: int) -> Tensor:
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def crops(height: int, width: int) -> Iterator[Tensor]:
    """Central parts, uint8 (3, height, width), of images; of their row or column if too small."""
    images = [data.read_image(path) for path in IMAGES]
    rows, columns = images[0].shape[1:]
    if height > rows or width > columns:
        images = [torch.cat(images, 1 if height > rows else 2)]
    yield from (data.centre(x, height, width) for x in images)


@torch.no_grad()
def cost(model: Codec, size: tuple[int, int], lmbda: float) -> str:
    """Bytes and PSNR of the crops of one size with repeated pixels and with `pad`, and the mean
    change of bpp + lmbda * 255^2 * MSE.
    """
    stated = model.provenance.config.get("lmbda")
    weight = stated if isinstance(stated, float) else lmbda
    rate = {"lmbda": lmbda} if "lmbda" in inspect.signature(model.compress).parameters else {}
    fingerprint = bitstream.fingerprint(model)
    totals, changes = [[0.0, 0.0], [0.0, 0.0]], []
    images = list(crops(*size))
    for image in images:
        x, costs = data.to_float(image)[None], []
        for fill, total in zip((repeated, pad), totals, strict=True):
            coded = model.compress(fill(x, model.downsampling_factor), **rate)
            file, = pack_images(model, coded, size, fingerprint)
            psnr = metrics.psnr(image, data.to_uint8(decode_images(model, [file], fingerprint)[0]))
            costs.append(metrics.bpp(len(file), *size)
                         + weight * 255**2 * 10 ** (-psnr / 10))
            total[0] += len(file) / len(images)
            total[1] += psnr / len(images)
        changes.append(costs[1] / costs[0] - 1)
    (before, psnr_before), (after, psnr_after) = totals
    return (f"{before:.0f} > {after:.0f} bytes, {psnr_before:.2f} > {psnr_after:.2f} dB, "
            f"cost {100 * sum(changes) / len(changes):+.1f} %")


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("papers", nargs="*", default=papers(), help="folders to measure")
    parser.add_argument("--lmbda", type=cli.positive_float, default=0.0067,
                        help="lmbda for weights of a variable rate")
    args = parser.parse_args(argv)
    for paper in args.papers:
        load = importlib.import_module(f"{paper}.model").load
        for path in sorted(Path(ROOT, paper, "weights").glob("small-*.pth")):
            model = load(path)
            for size in SIZES:
                print(f"{paper} {path.stem}, {size[0]}x{size[1]}: {cost(model, size, args.lmbda)}",
                      flush=True)


if __name__ == "__main__":
    cli.run(main)
