"""Measure what the padding of odd sizes costs: `image_file.pad` against repeated border pixels.

    python -m common.evaluation.padding [PAPER ...] [--lmbda 0.0067]

With the bundled weights: bytes of a row of four Kodak images side by side (1x3000) and, for each
size, the mean change of bpp + lmbda * 255^2 * MSE in percent:

                                     bytes  1x3000   700x1   9x700   33x47   65x65 127x129 333x449
    advdnic base-0.0035        4631 > 1743   -57.5   -57.0   -30.9    -7.6   -16.1    -7.0    -3.8
    advdnic base-0.013        11843 > 3355   -67.3   -63.9   -36.4    -9.0   -19.8    -8.1    -4.9
    checkerboard 0.0035        3833 > 1257   -61.3   -58.1   -32.7    -8.7   -16.3    -6.5    -3.7
    checkerboard 0.013         8193 > 2341   -65.8   -64.3   -35.2    -7.9   -19.1    -8.2    -4.3
    convnextic vr              6919 > 1543   -67.9   -64.2   -28.1    -6.6   -14.5    -6.0    -2.8
    factorized 0.0035           1293 > 813   -21.9   -23.9    -3.3    -1.5    -2.0    -1.0    -0.2
    factorized 0.013           3141 > 1913   -25.3   -24.8    -4.3    -0.9    -3.2    -1.2    -0.3
    hyperprior 0.0035          4295 > 1703   -55.2   -51.8   -29.3    -5.8   -14.1    -6.6    -3.5
    hyperprior 0.013           7863 > 2831   -58.5   -53.1   -32.6    -9.0   -15.9    -7.1    -3.7
    joint_ar 0.0035            3295 > 1071   -60.8   -59.0   -30.4    -5.7   -13.9    -6.4    -3.1
    joint_ar 0.013             6211 > 2083   -59.9   -58.4   -30.7    -9.8   -14.2    -6.0    -3.3
    qvrf balle                 7440 > 2404   -64.4   -58.7   -37.3   -14.4   -18.9    -8.5    -4.8
    tbtc swint-charm-0.0035    6143 > 1263   -75.3   -74.8   -41.1    -7.6   -19.7   -11.2    -5.9

PSNR falls where the cost falls most (2.4 to 4.6 dB at 1x3000 and 700x1, at most 0.4 dB from 9x700
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
