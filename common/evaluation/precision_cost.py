"""What g_a and g_s in bfloat16 cost in bits and in dB, for bundled weights of every paper.

    python -m common.evaluation.precision_cost        writes common/results/precision.json

Crops of four Kodak images are coded to files in either precision. A file of the float32 encoder is
also decoded in bfloat16, to the same symbols. The rounding of the products depends only a little on
the hardware, so the costs hold for every machine; speed needs bfloat16 products in hardware.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from common import cli, data
from common.coding import bitstream, codecs
from common.coding.contract import Codec
from common.coding.image_file import decode_image, encode_image
from common.coding.precision import PRECISIONS, use_precision
from common.evaluation.results import save_results
from common.papers import ROOT, papers

from torch import Tensor

IMAGES = ("kodim01", "kodim05", "kodim13", "kodim19")
LMBDA = {"lmbda": 0.013}  # for models of variable rate that need one
RESULTS = ROOT / "common" / "results" / "precision.json"


def crops() -> dict[str, Tensor]:
    """The middle 256x384 pixels of each image, (3, 256, 384) in [0, 1]."""
    found = {name: data.to_float(data.read_image(data.KODAK / f"{name}.png")) for name in IMAGES}
    corners = {name: (x.shape[1] // 2 - 128, x.shape[2] // 2 - 192) for name, x in found.items()}
    return {name: found[name][:, top : top + 256, left : left + 384]
            for name, (top, left) in corners.items()}


def psnr(x_hat: Tensor, x: Tensor) -> float:
    """PSNR in dB of the 8-bit pictures."""
    difference = data.to_uint8(x_hat).double() - data.to_uint8(x).double()
    return -10 * math.log10(float(difference.square().mean()) / 255**2)


def cost(model: Codec, images: list[Tensor], **rate: Any) -> dict[str, float]:
    """Mean differences of bfloat16 from float32: bits in percent, and dB; see `main`."""
    key, files, quality = bitstream.fingerprint(model), {}, {}
    for encoder in PRECISIONS:
        use_precision(model, encoder)
        files[encoder] = [encode_image(model, x, key, **rate) for x in images]
        for decoder in dict.fromkeys((encoder, "bf16")):
            use_precision(model, decoder)
            decoded = [decode_image(model, file, key) for file in files[encoder]]
            quality[encoder, decoder] = sum(map(psnr, decoded, images)) / len(images)
    before, after = (sum(map(len, files[precision])) for precision in PRECISIONS)
    reference = quality["fp32", "fp32"]
    return {"rate_percent": 100 * (after / before - 1),
            "decoder_dB": quality["fp32", "bf16"] - reference,
            "both_dB": quality["bf16", "bf16"] - reference}


def ends(paths: list[Path]) -> list[Path]:
    """The weights of lowest and highest rate of each kind."""
    kinds: dict[str, list[Path]] = {}
    for path in paths:
        kinds.setdefault(re.sub(r"-?[\d.]+$", "", path.stem), []).append(path)
    return [path for kind in kinds.values() for path in dict.fromkeys((kind[0], kind[-1]))]


def main() -> None:
    parser = cli.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to write")
    args = parser.parse_args()
    images, rows = crops(), {}
    for paper in papers():
        for path in ends(list(codecs.bundled(codecs.weights_folder(paper)).values())):
            model = codecs.loader(paper)(path)
            rate = LMBDA if getattr(model, "variable_rate", False) else {}
            row = rows[f"{paper} {path.stem}"] = cost(model, list(images.values()), **rate)
            print(f"{paper} {path.stem}: bits {row['rate_percent']:+.3f} %, decoder "
                  f"{row['decoder_dB']:+.4f} dB, both {row['both_dB']:+.4f} dB", flush=True)
    save_results(args.results, {"source": "python -m common.evaluation.precision_cost",
                                "images": list(images), "rows": rows})


if __name__ == "__main__":
    cli.run(main)
