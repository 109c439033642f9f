"""Plot the learned gains, and rate and PSNR against the regulator, from results of eval.py.

    python eval.py
    python eval.py --factormode 1 --sweep --name sweep
    python plot.py results/QVRF-small.json results/QVRF-sweep.json -o rate.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import UserError, cli
from common.evaluation import compare
from common.evaluation.results import load_results

from qvrf.model import LMBDAS, initial_gain


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description="Plot gains, and rate and PSNR against the regulator.")
    parser.add_argument("levels", type=Path, help="results JSON at the levels of a model")
    parser.add_argument("sweep", type=Path,
                        help="results JSON of the same model with --factormode 1 --sweep")
    parser.add_argument("-o", "--output", type=Path, default=Path("rate.png"),
                        help="image file to write")
    args = parser.parse_args(argv)
    levels, sweep = (load_results(path) for path in (args.levels, args.sweep))
    for path, curve, key in ((args.levels, levels, "level"), (args.sweep, sweep, "factor")):
        points = (curve.get("meta") or {}).get(key)
        if not isinstance(points, list) or None in points or (
                len(points) != len(curve["results"]["bpp"])):
            raise UserError(f"{path}: holds no {key} of its points; make it with qvrf/eval.py")
    compare.save_figure(draw(levels, sweep), args.output)
    print(f"plot: {args.output}")


def draw(levels: dict[str, Any], sweep: dict[str, Any]) -> Any:
    """A figure of three panels: Gain against lmbda, rate and PSNR against the regulator."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (gains, rate, psnr) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    learned = dict(zip(levels["meta"]["level"], levels["meta"]["factor"], strict=True))
    lmbdas = LMBDAS[: max(learned) + 1]
    gains.loglog(lmbdas, initial_gain(len(lmbdas)), "--", color="gray", label="initial")
    gains.loglog([LMBDAS[s] for s in learned], learned.values(), "o", label="learned")
    gains.set(xlabel="lmbda", ylabel="Gain")
    gains.legend()
    for axes, key, name in ((rate, "bpp", "bits per pixel"), (psnr, "psnr-rgb", "PSNR (dB)")):
        for curve, style, label in ((sweep, ".-", "any factor"), (levels, "o", "the levels")):
            points = sorted(zip(curve["meta"]["factor"], curve["results"][key], strict=True))
            axes.semilogx(*zip(*points, strict=True), style, label=label)
        axes.set(xlabel="regulator a", ylabel=name)
        axes.legend()
    for axes in (gains, rate, psnr):
        axes.grid(alpha=0.3, which="both")
    return figure


if __name__ == "__main__":
    cli.run(main)
