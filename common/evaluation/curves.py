"""Plot the training curves of several runs, and print their last epochs in a table.

    python -m common.evaluation.curves hyperprior/logs/quick/0 joint_ar/logs/quick/0
    python -m common.evaluation.curves hyperprior/logs/quick/* --html report.html

The plot is that of the mean loss of each epoch in log.txt. The page of --html has every quantity in
log.txt and in TensorBoard's event files, by steps and by hours, and a table of the runs. Two runs
are comparable if lmbda, the number of steps and the batch size are the same; runs with the same
--seed even see the same crops.
"""

from __future__ import annotations

from pathlib import Path

from common import UserError, cli, html_page
from common.evaluation import compare
from common.evaluation.curves_page import write_page
from common.evaluation.runs import paper_of, read_epochs, read_run


def flags() -> cli.Parser:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folders", type=Path, nargs="+", metavar="RUN",
        help="log folder of a run, which holds its log.txt: <paper>/logs/<prefix>/<exp_version>")
    add("--names", nargs="+", help="names of the runs in table, plot and page")
    add("--plot", type=Path, help="PNG file to write; curves.png if neither it nor --html is given")
    add("--html", type=Path, help="page to write, one file that works from disk: curves of all "
        "logged quantities that can be switched on and off, and a table of the runs")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    if args.html and (need := html_page.missing()):
        raise UserError(f"--html needs Plotly: {need}")
    if args.names and not len({*args.names}) == len(args.names) == len(args.folders):
        raise UserError(f"--names: give {len(args.folders)} different names, one for each run")
    names = args.names or compare.distinct(
        [paper_of(f, {}) or str(f) for f in args.folders], [str(f) for f in args.folders])
    rows = {name: read_epochs(folder) for name, folder in zip(names, args.folders, strict=True)}
    print(last_epochs(rows))
    if args.plot or not args.html:
        plot(rows, args.plot or Path("curves.png"))
        print(f"\nplot: {args.plot or 'curves.png'}")
    if args.html:
        write_page(args.html, dict(zip(names, map(read_run, args.folders), strict=True)))
        print(f"\npage: {args.html}")


def last_epochs(rows: dict[str, list[dict[str, float]]]) -> str:
    """A table in Markdown with the last epoch of each run."""
    lines = ["| run | steps | train loss | train bpp | test loss | test bpp | test PSNR |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    for name, epochs in rows.items():
        last = epochs[-1]
        test = [f"{last[k]:.4f}" if k in last else "-" for k in ("test_loss", "test_bpp")]
        psnr = f"{last['test_psnr']:.2f}" if "test_psnr" in last else "-"
        lines.append(f"| {name} | {last['step']:,.0f} | {last['loss']:.4f} | {last['bpp']:.4f} | "
                     f"{' | '.join(test)} | {psnr} |")
    return "\n".join(lines)


def plot(rows: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Write a PNG of the mean loss of each epoch of each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, epochs in rows.items():
        axes.plot([e["step"] for e in epochs], [e["loss"] for e in epochs], marker=".", label=name)
    axes.set(xlabel="training step", ylabel="loss = bpp + lmbda * 255² * MSE, mean over an epoch")
    late = [e["loss"] for epochs in rows.values() for e in epochs[min(1, len(epochs) - 1):]]
    margin = 0.05 * (max(late) - min(late)) + 1e-3
    axes.set_ylim(min(late) - margin, max(late) + margin)  # the first epoch would hide the others
    axes.grid(alpha=0.3)
    axes.legend()
    compare.save_figure(figure, path)


if __name__ == "__main__":
    cli.run(main)
