"""Compare the speed with CompressAI's, for the same weights, symbols and images.

    python -m common.evaluation.bench hyperprior factorized        or  make bench
    python -m common.evaluation.bench hyperprior --cpu-time --publish

Times on a shared machine drift, so the two sides take turns, and the result is the median of the
ratios. CompressAI runs unchanged: float32, contiguous tensors, its own coder calls. Coding and
training are also timed in separate processes, because the allocator setting of `common` affects a
whole process, and users of CompressAI do not have it. On a machine that is busy with other work,
--cpu-time measures the CPU time of one thread in place of the time on the clock. --device cuda
compares on a GPU.

--publish writes the ratios to common/results/bench.json, or those of a GPU to bench-gpu.json, where
those of other papers are kept, and the table of RESULTS.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from common import UserError, cli, data, processes
from common.coding import codecs, entropy, precision
from common.coding.contract import Codec, Coded
from common.evaluation.curve_values import markdown
from common.evaluation.results import save_results
from common.loss import RateDistortionLoss
from common.papers import ROOT, papers
from common.recipes.tables import write_table
from common.training.cuda_graph import WARM_UP, Recorded
from common.training.network import autocast, default_precision, prepare_network
from common.training.optimizers import make_optimizers

import compressai
import torch
from compressai.layers import GDN
from compressai.models import CompressionModel
from torch import nn

Step = Callable[[], object]
Model = Codec | Any  # ours, or one of CompressAI with the same parts
AnyModel = TypeVar("AnyModel", bound=CompressionModel)
measured: dict[str, dict[str, float]] = {}  # medians by the name of the comparison
clock = time.perf_counter  # or time.process_time
device = torch.device("cpu")  # or a GPU, by --device
CPU_TIME = "--cpu-time"
TABLES = {"cpu": ("speed", "bench.json"), "cuda": ("speed-gpu", "bench-gpu.json")}  # of RESULTS.md


@torch.no_grad()
def widen(model: nn.Module, target: AnyModel) -> AnyModel:
    """Fill `target`, a wider network, so that it computes the same as `model`, by copying channels.

    This gives a network of the paper's size with trained statistics, made from the bundled small
    weights; a random network would code almost nothing. Copies of a channel are adjacent, so the
    halves of a tensor stay its halves.
    """

    def source(wide: int, narrow: int) -> torch.Tensor:
        return torch.arange(wide) * narrow // wide

    for small, large in zip(model.parameters(), target.parameters(), strict=True):
        values: torch.Tensor = small
        for dim in range(values.dim()):
            if values.size(dim) != large.size(dim):
                values = values.index_select(dim, source(large.size(dim), values.size(dim)))
        large.copy_(values)
    for layer, wide in zip(model.modules(), target.modules(), strict=True):
        if not isinstance(wide, (nn.Conv2d, nn.ConvTranspose2d, GDN)):
            continue
        name, dim = "weight", 0 if isinstance(wide, nn.ConvTranspose2d) else 1
        if isinstance(wide, GDN):
            name = "gamma"  # stored as a square root
        weight, narrow = wide.get_parameter(name), layer.get_parameter(name).size(dim)
        of = source(weight.size(dim), narrow)
        copies = torch.bincount(of, minlength=narrow)[of].to(weight)  # of each input channel
        copies = copies.sqrt() if name == "gamma" else copies
        weight.div_(copies.view([-1 if d == dim else 1 for d in range(weight.dim())]))
    target.update(force=True)
    return target.eval()


def pair(paper: str, N: int | None = None, M: int | None = None) -> tuple[Codec, Model]:
    """Our network and CompressAI's, with the same weights, at the width of the paper."""
    module = importlib.import_module(f"{paper}.model")
    default = module.build()
    small = module.load(weights(paper)[-1])
    ours = widen(small, type(small)(N or default.N, M or default.M))
    has_own = (ROOT / paper / "baseline.py").exists()
    kind = (importlib.import_module(f"{paper}.baseline") if has_own else module).BASELINE
    baseline = kind(ours.N, ours.M).eval()
    baseline.load_state_dict(ours.state_dict())
    return ours.to(device, memory_format=torch.channels_last), baseline.to(device)


def photograph() -> torch.Tensor:
    """The image that is coded: (1, 3, 512, 768) in [0, 1]."""
    return data.to_float(data.read_image(data.KODAK / "kodim01.png"))[None].to(device)


def seconds(step: Step) -> float:
    processes.synchronize(device)
    start = clock()
    step()
    processes.synchronize(device)
    return clock() - start


def timed(step: Step) -> float:
    """Time of the second of two calls in seconds.

    The first call after another model's is slower, because of the state of memory and caches.
    """
    step()
    return seconds(step)


def compare(name: str, ours: Step, baseline: Step, rounds: int) -> None:
    """Time both in turns, and print the medians and the median ratio."""
    show(name, [(timed(baseline), timed(ours)) for _ in range(rounds)])


def show(name: str, times: list[tuple[float, float]]) -> None:
    theirs, mine = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    measured[name] = {"compressai_ms": 1e3 * theirs, "ours_ms": 1e3 * mine, "ratio": ratio,
                      "runs": len(times)}
    print(f"{name:58s} {1e3 * theirs:9.1f} ms {1e3 * mine:9.1f} ms   {ratio:5.2f}x", flush=True)


# ------------------------------------------------------------------------------------ start-up
def cpu_seconds(*words: str) -> float:
    """CPU time of `python WORDS...`, which prints what nobody reads."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return spent() - before


def start_up(papers: list[str], rounds: int) -> None:
    """CPU time until codec.py has loaded its libraries, relative to `import torch`, in turns."""
    scripts = [str(ROOT / paper / "codec.py") for paper in papers]
    cpu_seconds("-c", "import torch")  # from disk, for the first time
    times = [(cpu_seconds("-c", "import torch"), *(cpu_seconds(s, "--help") for s in scripts))
             for _ in range(rounds)]
    for i, paper in enumerate(papers, 1):
        median = statistics.median(row[i] for row in times)
        ratio = statistics.median(row[i] / row[0] for row in times)
        print(f"{paper + ': codec.py --help, CPU time':58s} {'':12s} {1e3 * median:9.1f} ms"
              f"   {ratio:5.2f} times import torch", flush=True)


# -------------------------------------------------------------------------------------- coding
def coding(paper: str, rounds: int) -> None:
    """Time the entropy coder, then compress + decompress, on a 512x768 image in this process."""
    ours, baseline = pair(paper)
    x, context = photograph(), has_context(ours)
    if not context:
        calls = entropy_calls(ours, x), entropy_calls(baseline, x, theirs=True)
        for (name, mine), (_, theirs) in zip(*calls, strict=True):
            compare(f"{paper}: {name}, 512x768", mine, theirs, 3 * rounds)
    for which in ("fp32", "bf16") if default_precision(device) == "bf16" else ("fp32",):
        precision.use_precision(ours, which)
        of = f"{', bf16' * (which == 'bf16')}, same process"
        if context:
            compare(f"{paper}: compress{of}", lambda: ours.compress(x),
                    lambda: baseline.compress(x), rounds)
            compare(f"{paper}: decompress{of}", decode(ours, x), decode(baseline, x), rounds)
        else:
            compare(f"{paper}: compress + decompress{of}", code(ours, x), code(baseline, x), rounds)
    precision.use_precision(ours, "fp32")
    if context:
        files = ours.compress(x), baseline.compress(x)
        ours.g_s = baseline.g_s = nn.Identity()
        compare(f"{paper}: decompress without g_s", decode(ours, x, files[0]),
                decode(baseline, x, files[1]), rounds)


def has_context(model: nn.Module) -> bool:
    """Whether the model predicts latents from others, so that coding goes step by step."""
    return "context_prediction" in dict(model.named_children())


def lacks(paper: str) -> str:
    """What the folder of a paper lacks for a comparison with CompressAI; "" if nothing."""
    module = importlib.import_module(f"{paper}.model")
    if not (ROOT / paper / "baseline.py").exists() and "BASELINE" not in vars(module):
        return "neither a baseline.py nor a BASELINE in its model.py"
    return "" if weights(paper) else "no bundled weights"


def weights(paper: str) -> list[Path]:
    return list(codecs.bundled(codecs.weights_folder(paper)).values())


def among_papers(papers: list[str], rounds: int) -> None:
    """Time our decoders at equal widths, in turns, also relative to the first paper's."""
    x = photograph()
    steps = [decode(pair(paper, 192, 192)[0], x) for paper in papers]
    times = [[timed(step) for step in steps] for _ in range(rounds)]
    for i, paper in enumerate(papers):
        ratio = statistics.median(row[i] / row[0] for row in times)
        median = statistics.median(row[i] for row in times)
        print(f"decompress, N=M=192: {paper:20s} {1e3 * median:9.1f} ms"
              f"   {ratio:5.2f} times {papers[0]}", flush=True)


@torch.no_grad()
def entropy_calls(model: Model, x: torch.Tensor, theirs: bool = False) -> list[tuple[str, Step]]:
    """[(name, function)]: entropy encoding and decoding of the model's symbols for x."""
    y = model.g_a(x)
    bottleneck, latent = model.entropy_bottleneck, y
    jobs: list[tuple[Step, Step]] = []
    if "h_a" in dict(model.named_children()):
        latent = model.h_a(y.abs())
        z_hat = bottleneck.dequantize(bottleneck.quantize(latent, "symbols", _medians(bottleneck)),
                                      _medians(bottleneck))
        gaussian = model.gaussian_conditional
        scales, means = model.h_s(z_hat), None
        if scales.shape[1] == 2 * y.shape[1]:  # means, too: behind the scales, as in CompressAI
            scales, means = scales.chunk(2, 1)
        indexes = gaussian.build_indexes(scales)
        if theirs:
            strings = gaussian.compress(y, indexes, means)
            jobs.append((lambda: gaussian.compress(y, indexes, means),
                         lambda: gaussian.decompress(strings, indexes, means=means)))
        else:
            tables, centred = entropy.Tables.of(gaussian), y if means is None else y - means
            strings = entropy.encode(centred.round(), indexes, tables)
            jobs.append((lambda: entropy.encode(centred.round(), indexes, tables),
                         lambda: entropy.decode(strings, indexes, tables)))
    shape = latent.shape[-2:]
    if theirs:
        z_strings = bottleneck.compress(latent)
        jobs.append((lambda: bottleneck.compress(latent),
                     lambda: bottleneck.decompress(z_strings, shape)))
    else:
        z_strings = entropy.encode_bottleneck(bottleneck, latent)
        jobs.append((lambda: entropy.encode_bottleneck(bottleneck, latent),
                     lambda: entropy.decode_bottleneck(bottleneck, z_strings, shape)))
    encoders, decoders = zip(*jobs, strict=True)
    return [("entropy encoding", lambda: [f() for f in encoders]),
            ("entropy decoding", lambda: [f() for f in decoders]),
            ("entropy coding, both ways", lambda: [f() for f in encoders + decoders])]


def _medians(bottleneck: entropy.EntropyBottleneck) -> torch.Tensor:
    return bottleneck.quantiles[:, :, 1:2].detach().reshape(1, -1, 1, 1)


def code(model: Model, x: torch.Tensor) -> Step:
    def run() -> None:
        with torch.no_grad():
            result = model.compress(x)
            model.decompress(result["strings"], result["shape"])
    return run


@torch.no_grad()
def decode(model: Model, x: torch.Tensor, file: Coded | None = None) -> Step:
    result = file or model.compress(x)

    def run() -> None:
        with torch.no_grad():
            model.decompress(result["strings"], result["shape"])
    return run


# ------------------------------------------------------------------------ processes of their own
def worker(job: str, paper: str, side: str) -> None:
    """Run one side of one job in this process and print its median seconds."""
    if job == "codec":
        model = pair(paper)[side == "baseline"]
        x = photograph()
        step, rounds = code(model, x), 5
    else:
        step, rounds = training_step(paper, side), 5
        for _ in range(WARM_UP + 1 if device.type == "cuda" else 1):
            step()
    step()
    print(statistics.median(seconds(step) for _ in range(rounds)))


def training_step(paper: str, side: str) -> Step:
    """A training step at the width of the paper, 8 crops of 256x256.

    side: baseline, bf16 or compiled.
    """
    module = importlib.import_module(f"{paper}.model")
    ours = side != "baseline"
    model = module.build()
    if not ours:
        model = module.BASELINE(model.N, model.M)
    model.train()
    layout = torch.channels_last if ours else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    net = prepare_network(model, compile=side == "compiled")
    return descent(model, net, tiles().to(device, memory_format=layout), 0.013,
                   "auto" if ours else "fp32", graph=ours)


def tiles() -> torch.Tensor:
    """A batch of 8 crops of 256x256."""
    crops = data.Crops(data.find_items(None), 256)
    return torch.stack([data.to_float(crops[k]) for k in range(8)])


def descent(model: CompressionModel, net: Callable[[torch.Tensor], dict[str, Any]],
            x: torch.Tensor, lmbda: float, which: str, graph: bool = False) -> Step:
    """A step of both optimisers of `model`, whose forward pass is net(x).

    which: precision of training; graph: on a GPU, replay it from a CUDA graph, as train.py does.
    """
    optimizer, aux_optimizer = make_optimizers(model, "adam", 1e-4)
    criterion = RateDistortionLoss(lmbda)

    def step(x: torch.Tensor) -> dict[str, torch.Tensor]:
        with autocast(x.device, which):
            output = net(x)
        losses = criterion(output, x)
        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.aux_loss().backward()
        aux_optimizer.step()
        return losses

    recorded = Recorded(step, optimizer, aux_optimizer, enabled=graph)
    return lambda: recorded(x)


def separate_processes(job: str, paper: str, side: str, rounds: int) -> None:
    """Time both sides in turns, each in a new process; the baseline uses the default allocator."""

    def once(which: str) -> float:
        env = dict(os.environ, **({"LIC_DEFAULT_MALLOC": "1"} if which == "baseline" else {}))
        command = [sys.executable, "-m", "common.evaluation.bench", "--worker", job, paper, which,
                   "--device", device.type, *([CPU_TIME] if clock is time.process_time else [])]
        out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
        return float(out.stdout.split()[-1])

    name = {"codec": "compress + decompress, own processes",
            "train": f"training step 8x256x256, {side}"}[job]
    show(f"{paper}: {name}", [(once("baseline"), once(side)) for _ in range(rounds)])


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    known = papers()
    parser.add_argument("papers", nargs="*",
                        help=f"papers to time, from {', '.join(known)}; all if not given")
    parser.add_argument("--rounds", type=int, default=3, help="number of turns per comparison")
    parser.add_argument("--results", type=Path, help="JSON file of the ratios to write")
    parser.add_argument("--publish", action="store_true",
                        help="also write them to common/results/ and RESULTS.md")
    parser.add_argument(CPU_TIME, action="store_true",
                        help="measure the CPU time of one thread, for machines that are shared")
    parser.add_argument("--device", default="cpu", help="device to compare on: cpu or cuda")
    parser.add_argument("--no-training", action="store_true", help="leave out the training steps")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.papers) - set(known):
        raise UserError(f"no paper {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    args.papers = args.papers or known
    global device
    device = processes.parse_device(args.device)
    if args.cpu_time and device.type != "cpu":
        raise UserError(f"{CPU_TIME} measures a CPU: leave it out, or --device {args.device}")
    if args.cpu_time:
        use_cpu_time()
    if args.worker:
        worker(*args.worker)
        return
    hardware = processes.describe_hardware(device)
    print(f"{hardware}, torch {torch.__version__}; the papers' widths")
    print(f"{'':58s} {'CompressAI':>12s} {'ours':>12s}   ratio")
    if codecs := [paper for paper in args.papers if weights(paper)]:
        start_up(codecs, args.rounds)
    own = [paper for paper in args.papers if (ROOT / paper / "bench.py").exists()]
    for paper in own:
        importlib.import_module(f"{paper}.bench").run(args.rounds)
    args.papers = [paper for paper in args.papers if paper not in own]
    for paper in list(args.papers):
        if reason := lacks(paper):
            print(f"{paper}: not compared, it has {reason}")
            args.papers.remove(paper)
    for paper in args.papers:
        context = has_context(importlib.import_module(f"{paper}.model").build(4, 6))
        coding(paper, args.rounds if context else 3 * args.rounds)
        if not context:
            separate_processes("codec", paper, "ours", args.rounds)
            for side in () if args.no_training else ("bf16", "compiled"):
                separate_processes("train", paper, side, args.rounds)
    if len(args.papers) > 1:
        among_papers(args.papers, 3 * args.rounds)
    if args.results:
        save_results(args.results, facts(hardware))
        print(f"{args.results}: written")
    if args.publish:
        publish(ROOT, facts(hardware))


def use_cpu_time() -> None:
    """Measure the CPU time of one thread from now on."""
    global clock
    clock = time.process_time
    torch.set_num_threads(1)


def facts(hardware: str) -> dict[str, Any]:
    """All that `show` has printed, with the machine and the versions."""
    kind = "CPU time of one thread" if clock is time.process_time else "time"
    return {"source": "python -m common.evaluation.bench", "hardware": hardware, "measured": kind,
            "python": platform.python_version(), "torch": torch.__version__,
            "compressai": compressai.__version__, "rows": measured}


def publish(root: Path, found: dict[str, Any]) -> None:
    """Add the rows to the file in common/results/, and write the table of RESULTS.md.

    Rows of other papers are kept if machine and versions are the same.
    """
    table, file = TABLES[device.type]
    path = root / "common" / "results" / file
    known = json.loads(path.read_text()) if path.exists() else {}
    same = all(known.get(key) == found[key] for key in found if key != "rows")
    found = found | {"rows": (known["rows"] if same else {}) | found["rows"]}
    save_results(path, found)
    write_table(root / "RESULTS.md", table, speed_table(found))


def speed_table(found: dict[str, Any]) -> str:
    """The rows of a results file as Markdown, below a line with machine and versions."""
    what = found["measured"]
    rows = [[what, "CompressAI", "here", "ratio", "runs"]]
    rows += [[name, *(f"{row[key]:,.0f} ms" for key in ("compressai_ms", "ours_ms")),
              f"{row['ratio']:.1f}x", str(row["runs"])] for name, row in found["rows"].items()]
    about = (f"{what[0].upper()}{what[1:]}; medians of interleaved runs. {found['hardware']}; "
             f"torch {found['torch']}, CompressAI {found['compressai']}.")
    return f"{textwrap.fill(about, 100)}\n\n{markdown(rows)}"


if __name__ == "__main__":
    cli.run(main)
