"""File sizes under three rules for the CDF table of a latent, over all bundled weights.

    python -m common.evaluation.index_rule              all papers, 24 Kodak images
    python -m common.evaluation.index_rule joint_ar --images 3

A scale between two entries of the scale table is coded with one of their two CDF tables. Rules:
`nearest` in ratio (`exact.scale_indexes`), `next` larger (CompressAI), and `crossing`, the scale
at which a Gaussian costs the same number of bits under both tables. Decoders know the first only;
the others are measured here to judge it. Writes common/results/index_rule.json.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from common import UserError, cli, data
from common.coding import codecs, exact, image_file
from common.files import write_atomic
from common.papers import papers

import torch
from torch import Tensor

RESULTS = Path(__file__).parents[1] / "results" / "index_rule.json"
nearest = exact.scale_boundaries


def next_larger(scale_table: Tensor) -> Tensor:
    """Boundaries with which a scale gets the smallest entry that is not below it."""
    return scale_table.double()[:-1]


def crossing(scale_table: Tensor) -> Tensor:
    """The scales at which two neighbouring tables give a rounded Gaussian the same mean cost."""
    table, boundaries = scale_table.double().cpu(), []
    for smaller, larger in zip(table[:-1], table[1:], strict=True):
        symbols = torch.arange(int(larger * 12) + 10, dtype=torch.float64)
        cost = [-torch.log2(_mass(symbols, s).clamp_min(2**-16)) for s in (smaller, larger)]
        low, high = float(smaller), float(larger)
        for _ in range(50):
            middle = (low + high) / 2
            mass = _mass(symbols, torch.tensor(middle, dtype=torch.float64))
            mass[1:] *= 2  # both signs
            low, high = ((low, middle) if float((mass * (cost[0] - cost[1])).sum()) > 0
                         else (middle, high))
        boundaries.append(low)
    return torch.tensor(boundaries, dtype=torch.float64, device=scale_table.device)


def _mass(symbols: Tensor, scale: Tensor) -> Tensor:
    """Probability of integers >= 0 under a rounded Gaussian, accurate in the tails."""
    return (torch.special.ndtr((0.5 - symbols) / scale)
            - torch.special.ndtr((-0.5 - symbols) / scale))


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "nearest": nearest, "next": next_larger, "crossing": crossing}


@torch.no_grad()
def measure(paper: str, weights: Path, images: list[Tensor]) -> dict[str, int]:
    """Bytes of the files of `images`, at the default rate of the model, for each rule; {} for a
    model that predicts no scales.
    """
    model = importlib.import_module(f"{paper}.model").load(weights)
    if "gaussian_conditional" not in dict(model.named_children()):
        return {}
    sizes = {}
    for name, rule in RULES.items():
        with mock.patch.object(exact, "scale_boundaries", rule):
            sizes[name] = sum(len(image_file.encode_image(model, x)) for x in images)
    return sizes


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("papers", nargs="*", metavar="PAPER", help="folders; all if not given")
    parser.add_argument("--images", type=cli.positive_int, default=24,
                        help="number of Kodak images")
    args = parser.parse_args(argv)
    paths = data.list_images(data.KODAK)[:args.images]
    images = [data.to_float(data.read_image(path)) for path in paths]
    rows = {}
    for paper in args.papers or papers():
        for weights in codecs.bundled(codecs.weights_folder(paper)).values():
            try:
                sizes = measure(paper, weights, images)
            except UserError as e:  # a variable rate without a default
                print(f"{paper}/{weights.stem}: left out ({e})")
                continue
            if sizes:
                rows[f"{paper}/{weights.stem}"] = sizes
                changes = "".join(f"  {rule} {100 * (size / sizes['nearest'] - 1):+.2f} %"
                                  for rule, size in sizes.items() if rule != "nearest")
                print(f"{paper}/{weights.stem}: nearest {sizes['nearest']:,} bytes{changes}")
    if len(images) == 24 and not args.papers:
        RESULTS.parent.mkdir(exist_ok=True)
        content = {"source": "python -m common.evaluation.index_rule", "images": len(images),
                   "bytes": rows}
        write_atomic(RESULTS, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    cli.run(main)
