"""Plot the training curves of several runs, and print their last epochs in a table.

    python -m common.evaluation.curves hyperprior/logs/quick/0 joint_ar/logs/quick/0

It reads the log.txt of each folder and plots the mean loss over the steps of each epoch. Two runs
are comparable if lmbda, the number of steps and the batch size are the same; runs with the same
--seed even see the same crops.
"""

from __future__ import annotations

import re
from pathlib import Path

from common import UserError, cli
from common.evaluation import compare
from common.files import read_file

LINE = re.compile(r"epoch (\d+)  step (\d+)  train loss ([\d.]+) bpp ([\d.]+)"
                  r"(?:  test loss ([\d.]+) bpp ([\d.]+) psnr ([\d.]+))?")


def read(folder: Path) -> list[dict[str, float]]:
    """A row per epoch: step, loss, bpp and, if validated, test_loss, test_bpp and test_psnr."""
    text = read_file(folder / "log.txt").decode(errors="replace")
    keys = ("step", "loss", "bpp", "test_loss", "test_bpp", "test_psnr")
    epochs = {}  # a run that resumed earlier repeats epochs; the last line counts
    for match in LINE.finditer(text):
        values = zip(keys, match.groups()[1:], strict=True)
        epochs[int(match[1])] = {key: float(v) for key, v in values if v is not None}
    if not epochs:
        raise UserError(f"{folder}/log.txt: holds no finished epoch")
    return [epochs[epoch] for epoch in sorted(epochs)]


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+",
                        help="log folders of runs: <paper>/logs/<prefix>/<exp_version>")
    parser.add_argument("--plot", type=Path, default=Path("curves.png"), help="PNG file to write")
    args = parser.parse_args(argv)
    names = compare.distinct([f.resolve().parts[-4:][0] for f in args.folders],  # paper
                             [str(f) for f in args.folders])
    rows = {name: read(folder) for name, folder in zip(names, args.folders, strict=True)}

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    print("| run | steps | train loss | train bpp | test loss | test bpp | test PSNR |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, epochs in rows.items():
        last = epochs[-1]
        test = [f"{last[k]:.4f}" if k in last else "-" for k in ("test_loss", "test_bpp")]
        psnr = f"{last['test_psnr']:.2f}" if "test_psnr" in last else "-"
        print(f"| {name} | {last['step']:,.0f} | {last['loss']:.4f} | {last['bpp']:.4f} | "
              f"{' | '.join(test)} | {psnr} |")
        axes.plot([e["step"] for e in epochs], [e["loss"] for e in epochs], marker=".", label=name)
    axes.set(xlabel="training step", ylabel="loss = bpp + lmbda * 255² * MSE, mean over an epoch")
    late = [e["loss"] for epochs in rows.values() for e in epochs[min(1, len(epochs) - 1):]]
    margin = 0.05 * (max(late) - min(late)) + 1e-3
    axes.set_ylim(min(late) - margin, max(late) + margin)  # the first epoch would hide the others
    axes.grid(alpha=0.3)
    axes.legend()
    compare.save_figure(figure, args.plot)
    print(f"\nplot: {args.plot}")


if __name__ == "__main__":
    cli.run(main)
