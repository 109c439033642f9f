"""Evaluate a codec on images: write files, decode them, and measure rate, quality and time."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from common import UserError, cli, data, image_check, locks, processes
from common.coding import bitstream, codecs, precision
from common.coding.contract import Codec
from common.coding.image_file import crop, decode_images, encode_images, pad
from common.coding.model_file import load_checkpoint
from common.coding.tiles import LIMIT
from common.evaluation.results import (
    image_names,
    image_record,
    merge_points,
    operating_point,
    save_results,
)
from common.files import read_file, write_atomic
from common.training.checkpoints import epoch_checkpoints, newest

import compressai
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

Result = TypeVar("Result")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all evaluation scripts have."""
    add = parser.add_argument_group("flags of all papers").add_argument
    add("--outdir", default="./output", help="folder of bitstreams and decoded images")
    add("--resultdir", default="./results", help="folder of results: JSON, CSV and plot")
    add("--test_batch_size", type=cli.positive_int, default=1,
        help="maximum number of images of equal size per batch")
    add("--entropy_device", default="cpu",
        help="device that computes the exact entropy parameters when coding: cpu or cuda")
    add("--checkpoint", type=Path, nargs="+", help="weights files; each is one point of the curve")
    add("--reproduce", action="store_true",
        help="evaluate the run that --config trained and the bundled weights")
    add("--config", type=Path, help="YAML file of the training run, for --reproduce")
    add("--complexity", action="store_true", help="print parameters and MACs without coding")
    add("--device", default="auto", help="device that runs the codec: auto, cpu or cuda")
    add("--threads", type=cli.threads, default=0, help="number of CPU threads; 0 uses all")
    add("--jobs", type=cli.positive_int, default=1,
        help="number of processes that share the images and the CPU; times per image are longer")
    precision.add_flag(parser)


def find_checkpoints(args: argparse.Namespace, bundled: Path, prefix: str,
                     names: tuple[str, ...]) -> dict[str, list[Path]]:
    """Weights to evaluate, by the name of the curve: see the flags above and --load_model_epoch.

    prefix: default of train.py. names: the spellings of --model_name; an epoch is searched for in
    all runs of this model under ./ckpts.
    """
    small = list(codecs.bundled(bundled).values())
    if args.checkpoint:
        if args.load_model_epoch is not None:
            raise UserError("--checkpoint, --load_model_epoch: give one of them")
        return {curve_name(args.checkpoint): args.checkpoint}
    if args.reproduce:
        if not args.config:
            raise UserError("--reproduce needs --config, the file that the run was trained with")
        config = cli.read_yaml(args.config)
        prefix = config.get("prefix", prefix)
        folder = Path("ckpts", str(prefix), str(config.get("exp_version", 0)))
        trained = newest(epoch_checkpoints(folder))
        if trained is None:
            raise UserError(f"{folder}: holds no trained epoch; run train.py --config first")
        return {args.config.stem: [trained], "small": small}
    if args.load_model_epoch is not None:
        epoch = f"epoch_{args.load_model_epoch}"
        found = sorted(Path("ckpts").glob(f"**/{epoch}.pth"))
        found = [p for p in found if _trained_as(p) in names]
        found += sorted(p for name in names
                        for p in Path("ckpts", name).glob(f"{epoch}_lmbda_*.pth"))
        if not found:
            raise UserError(f"no {epoch}.pth of a {args.model_name} under ./ckpts; "
                            "name weights with --checkpoint")
        return {epoch: found}
    return {"small": small}


def test_images(path: str | Path | None) -> list[Path]:
    """The images to code, Kodak if `path` is None; UserError names all that cannot be decoded."""
    first = processes.rank() == 0
    paths = data.list_images(path or data.KODAK, print if path and first else lambda _: None)
    if path and first:
        image_check.check_readable(paths)
    return paths


def run_name(checkpoint: Path) -> str:
    """A name for a checkpoint and its run: its path, if that is below the current folder.

    Elsewhere, the last three parts of its path and a hash of the whole, so that the best.pth of two
    runs never share a name. Bundled weights are known by their own name.
    """
    path = Path(os.path.abspath(checkpoint))
    if path.parent.name == "weights" and path.name.startswith("small-"):
        return path.name.removesuffix(".pth")
    name = path.name.removesuffix(".tar").rsplit(".", 1)[0]  # .pth, .pt, .ckpt, .pth.tar
    with contextlib.suppress(ValueError):
        return "-".join([*path.relative_to(Path.cwd()).parent.parts, name])
    tail = hashlib.sha256(os.fsencode(path)).hexdigest()[:6]
    return "-".join([*path.parts[1:][-3:-1], name, tail])


def curve_name(checkpoints: list[Path]) -> str:
    """Name of the curve through these checkpoints, which is part of the names of its results."""
    more = f"-and-{len(checkpoints) - 1}-more" if len(checkpoints) > 1 else ""
    return run_name(checkpoints[0]) + more


def output_folder(outdir: str, model: Codec, checkpoint: Path) -> Path:
    """Folder for the files of one operating point, named after the paper and the checkpoint."""
    return Path(outdir, type(model).__module__.partition(".")[0], run_name(checkpoint))


def _trained_as(path: Path) -> str | None:
    return load_checkpoint(path).get("config", {}).get("model_name")


def curves_of(checkpoints: dict[str, list[Path]],
              measure: Callable[[str, Path], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Results of each curve; measure(name, checkpoint) returns the points of one of its weights.

    A curve without weights is skipped with a note; UserError if no curve has weights.
    """
    curves = []
    for name, paths in checkpoints.items():
        if paths:
            curves.append(merge_points([p for path in paths for p in measure(name, path)]))
        elif processes.rank() == 0:
            print(f"{name}: there are no bundled weights")
    if not curves:
        raise UserError("there are no weights to evaluate: train some, or name them with "
                        "--checkpoint")
    return curves


def fixed_rate_curves(args: argparse.Namespace, checkpoints: dict[str, list[Path]],
                      load: Callable[[Path, torch.device], Codec], images: list[Path],
                      device: torch.device, coding_device: torch.device,
                      meta: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of fixed-rate weights; meta(model): further entries for the table."""
    def measure(name: str, checkpoint: Path) -> list[dict[str, Any]]:
        model = load(checkpoint, device)
        model.coding_device = coding_device
        precision.use_precision(model, args.precision)
        out = output_folder(args.outdir, model, checkpoint)
        return [evaluate(model, images, name, str(checkpoint.name), out, args.test_batch_size,
                         meta(model))]

    return curves_of(checkpoints, measure)


def evaluate(model: Codec, paths: list[Path], name: str, description: str = "",
             out_dir: str | Path | None = None, batch_size: int = 1,
             meta: dict[str, Any] | None = None, entropy_estimation: bool = True,
             rate: dict[str, Any] | None = None) -> dict[str, Any]:
    """Results of one operating point on the images `paths`, as in `common.evaluation.results`.

    Every image is written to a file, read back and decoded. bpp counts all bytes of the file and
    the original pixels; PSNR and MS-SSIM are those of the 8-bit decoded image; times are seconds
    per image between tensor and bytes, after a warm-up image. With `entropy_estimation`,
    bpp_estimated is -log2 of the likelihoods of forward, per original pixel.

    out_dir: folder that keeps <name>.bin, the decoded <name>.png, and the results: results.json,
    or results-incomplete.json with those of the images that were coded before an error. Only one
    process uses it at a time. batch_size: maximum number of neighbours of equal size that are coded
    together. meta: further entries for the table, such as lmbda, steps and steps_source (of the
    paper's recipe). rate: the operating point of a variable-rate model. Under torchrun, each
    process codes a part of the images, and all return the whole result.
    """
    model.eval()
    fingerprint = bitstream.fingerprint(model)
    facts = _facts(model, fingerprint) | (meta or {})
    names = image_names(paths)
    mine = paths[processes.rank() :: processes.world()]
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(out_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(locks.locked(folder, "give another --outdir"))
        try:
            with tqdm(total=len(mine), desc=name, unit="image", leave=False, disable=None) as bar:
                for row in _code(model, mine, names, folder, fingerprint, batch_size, rate or {},
                                 entropy_estimation, bool(out_dir)):
                    rows.append(row)
                    bar.update()
        except BaseException as e:
            if rows and out_dir:
                number = f"-{processes.rank()}" if processes.world() > 1 else ""
                kept = folder / f"results-incomplete{number}.json"
                save_results(kept, operating_point(name, description, rows, facts))
                if isinstance(e, (UserError, OSError)):
                    raise UserError(f"{e} (the results of {len(rows)} of {len(mine)} images are "
                                    f"in {kept})") from None
            raise
        shares: list[Any] = [rows]
        if processes.world() > 1:
            shares = [None] * processes.world()
            dist.all_gather_object(shares, rows)
        order = {stem: i for i, stem in enumerate(names.values())}
        rows = sorted((r for share in shares for r in share), key=lambda r: order[r["image"]])
        point = operating_point(name, description, rows, facts)
        if out_dir and processes.rank() == 0:
            save_results(folder / "results.json", point)
            for old in folder.glob("results-incomplete*.json"):
                old.unlink()
    return point


def _code(model: Codec, paths: list[Path], names: dict[Path, str], folder: Path,
          fingerprint: bytes, batch_size: int, rate: dict[str, Any], entropy_estimation: bool,
          keep: bool) -> Iterator[dict[str, Any]]:
    """Write, read and decode each image; yields a row of results per image. See `evaluate`."""
    device = next(model.parameters()).device
    warm = False
    for batch, images in data.batches(paths, batch_size):
        group = [names[p] for p in batch]
        x = data.to_float(images.to(device))
        if not warm:
            files = encode_images(model, x, fingerprint, **rate)
            decode_images(model, files, fingerprint)
            warm = True
        files, encoding = time_call(
            partial(encode_images, model, x, fingerprint, **rate), device)
        for stem, file in zip(group, files, strict=True):
            write_atomic(folder / f"{stem}.bin", file)
        files = [read_file(folder / f"{stem}.bin") for stem in group]
        x_hat, decoding = time_call(partial(decode_images, model, files, fingerprint), device)
        small = x.shape[-2] * x.shape[-1] <= LIMIT  # a larger one may exceed the memory
        estimates = (_estimate(model, x, rate) if entropy_estimation and small
                     else [None] * len(group))
        decoded = data.to_uint8(x_hat).cpu()
        for i, stem in enumerate(group):
            if keep:
                data.write_image(decoded[i], folder / f"{stem}.png")
            times = {"encoding_time": encoding / len(group),
                     "decoding_time": decoding / len(group), "bpp_estimated": estimates[i]}
            yield image_record(stem, images[i], decoded[i], len(files[i])) | times


def _facts(model: Codec, fingerprint: bytes) -> dict[str, Any]:
    """Entries of the table on the weights, their training and this machine."""
    device = next(model.parameters()).device
    provenance = model.provenance
    facts = {
        "N": model.N, "M": model.M, "lmbda": provenance.config.get("lmbda"),
        "steps": provenance.total_steps, "validation": validation_of(model),
        "trained_on": provenance.hardware,
        "precision": precision.of(model), "fingerprint": fingerprint.hex(), "device": device.type,
        "hardware": processes.describe_hardware(device), "torch": torch.__version__,
        "compressai": compressai.__version__}
    return {key: value for key, value in facts.items() if value is not None}


def validation_of(model: Codec) -> str:
    """What the training was validated with; Kodak was the default before it was recorded."""
    return str(model.provenance.config.get("validation") or "not recorded")


@torch.no_grad()
def evaluate_estimate(model: Codec, paths: list[Path], name: str, multiple: int,
                      meta: dict[str, Any], rate: dict[str, Any] | None = None
                      ) -> dict[str, Any]:
    """Results of an operating point without files: the rate is estimated, and there are no times.

    multiple: height and width are padded to multiples of it. Rows also have the bits per latent.
    """
    rows = []
    model.eval()
    meta = {"steps": model.provenance.total_steps} | meta | {
        "validation": validation_of(model), "fingerprint": bitstream.fingerprint(model).hex()}
    names = image_names(paths)
    for path, batch in data.batches(paths, 1):
        x = data.to_float(batch.to(next(model.parameters()).device))
        output = model(pad(x, multiple), **(rate or {}))
        bits = {key: float(-p.double().log2().sum()) for key, p in output["likelihoods"].items()}
        x_hat = data.to_uint8(crop(output["x_hat"], x.shape[-2:])[0]).cpu()
        found = image_record(names[path[0]], batch[0], x_hat, math.ceil(sum(bits.values()) / 8))
        rows.append(found | {"bpp_estimated": found["bpp"]}
                    | {f"{key}_bits": value for key, value in bits.items()})
    return operating_point(name, "no files: bits of the likelihoods", rows, meta)


def in_half(module: nn.Module) -> None:
    """Run a transform in float16; not for transforms that must be exact on every machine."""
    precision.run_in(module, torch.float16)
    module.register_forward_hook(lambda _, args, output: output.float())


def time_call(function: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    def now() -> float:
        processes.synchronize(device)
        return time.perf_counter()

    start = now()
    result = function()
    return result, now() - start


@torch.no_grad()
def _estimate(model: Codec, x: Tensor, rate: dict[str, Any] | None = None) -> list[float]:
    """Estimated bits per original pixel for each image of x (B, 3, H, W)."""
    output = model(pad(x, model.downsampling_factor), **(rate or {}))
    likelihoods = output["likelihoods"].values()
    bits = sum(-p.double().log2().sum(dim=(1, 2, 3)) for p in likelihoods)
    return (bits / (x.shape[-2] * x.shape[-1])).tolist()
