"""Measure what the padding of odd sizes costs: `image_file.pad` against repeated border pixels.

    python -m common.evaluation.padding [PAPER ...] [--lmbda 0.0067]

With weights that were bundled before the present ones: bytes of a row of four Kodak images side by
side (1x3000) and, for each size, the mean change of bpp + lmbda * 255^2 * MSE in percent:

                                     bytes  1x3000   700x1   9x700   33x47   65x65 127x129 333x449
    advdnic base-0.0035        6131 > 2307   -58.4   -60.0   -29.7    -6.6   -16.7    -7.4    -4.3
    advdnic base-0.0067        9119 > 3575   -57.1   -54.0   -29.5    -7.0   -17.7    -9.1    -4.0
    checkerboard 0.0035        5605 > 2601   -49.8   -51.0   -26.7    -5.9   -16.0    -7.0    -3.8
    checkerboard 0.0067        7937 > 3649   -50.2   -53.0   -26.8    -6.7   -16.5    -6.9    -3.7
    convnextic vr              6935 > 1547   -68.0   -64.2   -28.0    -6.1   -13.0    -6.0    -2.9
    factorized 0.0035           1377 > 821   -24.9   -29.5    -2.7    -1.8    -1.8    -1.1    -0.3
    factorized 0.0067          1973 > 1181   -25.4   -26.5    -2.8    -0.6    -2.3    -0.9    -0.3
    hyperprior 0.0035          5887 > 1791   -65.0   -63.2   -35.7    -8.8   -18.0    -8.5    -4.8
    hyperprior 0.013          13507 > 3067   -73.0   -69.4   -42.2    -9.4   -22.7   -10.2    -6.0
    joint_ar 0.0035            4631 > 1191   -69.1   -68.7   -34.2    -7.1   -16.6    -6.6    -3.7
    joint_ar 0.0067            6819 > 1671   -70.2   -67.0   -35.2    -7.0   -16.2    -6.5    -3.8
    qvrf balle                11668 > 3864   -64.6   -62.5   -38.9   -10.0   -22.9   -11.6    -6.4
    qvrf minnen                7560 > 1904   -71.1   -70.6   -37.9    -9.8   -17.2    -7.7    -4.3
    tbtc conv-charm-0.0035     6675 > 1759   -69.6   -64.6   -37.0    -6.7   -20.6   -10.1    -5.2
    tbtc conv-charm-0.0067     9319 > 2403   -69.9   -65.0   -37.0    -7.9   -20.2    -9.8    -5.1

PSNR falls where the cost falls most (1.7 to 4.4 dB at 1x3000 and 700x1, 0.0 to 0.3 dB from 9x700
on): with the same weights, a border line that is not repeated gets fewer bits. Images whose sides
are multiples of the step are not padded, and their files are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from common import cli, data, metrics
from common.coding import bitstream, codecs
from common.coding.contract import Codec
from common.coding.image_file import decode_images, pack_images, pad
from common.papers import papers

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
        for path in codecs.bundled(codecs.weights_folder(paper)).values():
            model = codecs.loader(paper)(path)
            for size in SIZES:
                print(f"{paper} {path.stem}, {size[0]}x{size[1]}: {cost(model, size, args.lmbda)}",
                      flush=True)


if __name__ == "__main__":
    cli.run(main)
