"""Code images for real: any size, through the file format, timed, into a results JSON.

One results JSON holds one codec in CompressAI's form. Each list in "results" and "meta" has one
entry per operating point, in order of rising rate; so has "per_image", whose entries are the rows
of that point's images. A number that is not defined (MS-SSIM of a small image) is null.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common import UserError, bitstream, data, metrics, runs
from common.tiles import LIMIT

import compressai
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

MEASURES = ("bpp", "psnr-rgb", "ms-ssim-rgb", "encoding_time", "decoding_time", "bpp_estimated")


# --------------------------------------------------------------------- one image and its file
def pad(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of (B, C, H, W) until both sides are multiples."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo `pad`: the first (height, width) of (B, C, H, W)."""
    return x[..., : size[0], : size[1]]


@torch.no_grad()
def encode_images(model: nn.Module, x: Tensor, tag: bytes,
                  fingerprint: bytes | None = None, **rate: Any) -> list[bytes]:
    """x (B, 3, H, W) in [0, 1], any H and W -> B files.

    fingerprint: the model's, if at hand; rate: what a variable-rate model's `compress` takes.
    """
    fingerprint = fingerprint or bitstream.fingerprint(model)
    try:
        coded = model.compress(pad(x, model.downsampling_factor), **rate)
    except ValueError as e:
        raise UserError(f"the model cannot code this image: {e}") from None
    return pack_images(coded, x.shape[-2:], tag, fingerprint)


def pack_images(coded: dict[str, Any], size: tuple[int, int], tag: bytes, fingerprint: bytes
                ) -> list[bytes]:
    """Files of what `compress` returned for images of this size."""
    return [bitstream.pack(tag, fingerprint, *size, list(sections), coded.get("parameters", b""))
            for sections in zip(*coded["strings"], strict=True)]


def encode_image(model: nn.Module, x: Tensor, tag: bytes,
                 fingerprint: bytes | None = None, **rate: Any) -> bytes:
    """x (3, H, W) or (1, 3, H, W) in [0, 1] -> the file's bytes."""
    return encode_images(model, x.reshape(1, *x.shape[-3:]), tag, fingerprint, **rate)[0]


@torch.no_grad()
def decode_images(model: nn.Module, files: list[bytes], tag: bytes,
                  fingerprint: bytes | None = None) -> Tensor:
    """Files of images of one size and rate -> x_hat (B, 3, H, W) in [0, 1].

    Raises UserError for everything that is not a whole file of this model.
    """
    fingerprint = fingerprint or bitstream.fingerprint(model)
    parts = [bitstream.unpack(file, tag, fingerprint) for file in files]
    if len({(part.height, part.width, part.parameters) for part in parts}) > 1:
        raise UserError("files of several sizes or rates: decode them one by one")
    rate = model.read_parameters(parts[0].parameters) if hasattr(model, "read_parameters") else {}
    size, factor = (parts[0].height, parts[0].width), model.downsampling_factor
    shape = tuple(-(-side // factor) for side in size)  # of the last latent; so it is not stored
    try:
        strings = [list(s) for s in zip(*(part.sections for part in parts), strict=True)]
        x_hat = model.decompress(strings, shape, **rate)["x_hat"]
    except ValueError as e:
        raise UserError(f"the file's content does not decode ({e}): encode the image again") \
            from None
    return crop(x_hat, size)


def decode_image(model: nn.Module, file: bytes, tag: bytes,
                 fingerprint: bytes | None = None) -> Tensor:
    """A file's bytes -> x_hat (3, H, W) in [0, 1]."""
    return decode_images(model, [file], tag, fingerprint)[0]


def model_of(file: bytes, tag: bytes, checkpoints: Iterable[Path],
             load: Callable[[Path, torch.device], nn.Module], device: torch.device) -> nn.Module:
    """The model, of those in `checkpoints`, whose fingerprint the file carries."""
    wanted = bitstream.unpack(file, tag).fingerprint
    seen = []
    for path in checkpoints:
        model = load(path, device)
        seen.append(bitstream.fingerprint(model))
        if seen[-1] == wanted:
            return model
    have = ", ".join(s.hex() for s in seen) or "none"
    raise UserError(f"the file was encoded with the weights {wanted.hex()}, at hand are {have}: "
                    "pass the right --checkpoint")


# ------------------------------------------------------------------------------- a whole folder
def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that all our eval scripts have."""
    add = parser.add_argument_group("as in all folders").add_argument
    add("--outdir", default="./output", help="bitstreams and decoded images")
    add("--resultdir", default="./results", help="JSON, CSV, plot")
    add("--test_batch_size", type=runs.positive_int, default=1, help="images of equal size")
    add("--entropy_device", default="cpu", help="where what is exact runs when coding: cpu or cuda")
    add("--checkpoint", type=Path, nargs="+", help="weights, one point of the curve each")
    add("--reproduce", action="store_true", help="the run of --config beside the bundled weights")
    add("--config", type=Path, help="training configuration, for --reproduce")
    add("--complexity", action="store_true", help="print parameters and MACs, code nothing")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--threads", type=runs.threads, default=0, help="CPU threads; 0: all")


def find_checkpoints(args: argparse.Namespace, bundled: Path, prefix: str
                     ) -> dict[str, list[Path]]:
    """What to evaluate, by the name of its curve: see the flags above and --load_model_epoch.

    prefix: train.py's default. An epoch is looked for in all runs under ./ckpts that trained this
    --model_name.
    """
    small = sorted(bundled.glob("small-*.pth"))
    if args.checkpoint:
        return {args.checkpoint[0].stem: args.checkpoint}
    if args.reproduce:
        if not args.config:
            raise UserError("--reproduce needs --config, the file that the run was trained with")
        config = runs.read_yaml(args.config)
        prefix = config.get("prefix", prefix)
        folder = Path("ckpts", str(prefix), str(config.get("exp_version", 0)))
        trained = runs.epochs(folder)
        if not trained:
            raise UserError(f"{folder}: holds no trained epoch; run train.py --config first")
        return {args.config.stem: trained[-1:], "small": small}
    if args.load_model_epoch is not None:
        epoch = f"epoch_{args.load_model_epoch}"
        found = sorted(Path("ckpts").glob(f"**/{epoch}.pth"))
        found = [p for p in found if _trained_as(p) == args.model_name]
        found += sorted(Path("ckpts", args.model_name).glob(f"{epoch}_lmbda_*.pth"))
        if not found:
            raise UserError(f"no {epoch}.pth of a {args.model_name} under ./ckpts; "
                            "name weights with --checkpoint")
        return {epoch: found}
    return {"small": small}


def folder_of(outdir: str, name: str, checkpoint: Path) -> Path:
    """Where the files of one operating point go: epochs of several runs do not meet there."""
    run = "-".join(checkpoint.with_suffix("").parts[-3:])  # epoch_9 of which run
    return Path(outdir, name, run if name != "small" else checkpoint.stem)


def _trained_as(path: Path) -> str | None:
    return runs.load_checkpoint(path).get("config", {}).get("model_name")


def evaluate(model: nn.Module, paths: list[Path], tag: bytes, name: str, description: str = "",
             out_dir: str | Path | None = None, batch_size: int = 1,
             meta: dict[str, Any] | None = None, entropy_estimation: bool = True,
             rate: dict[str, Any] | None = None) -> dict[str, Any]:
    """Results of one operating point on the images `paths`: see the module's docstring.

    Every image is written to a file, read back and decoded. bpp counts all bytes of the file and
    the original pixels; PSNR and MS-SSIM are those of the 8-bit decoded image; times are seconds
    per image between tensor and bytes, after one image that does not count. With
    `entropy_estimation`, bpp_estimated = -log2 of forward's likelihoods, per original pixel.

    out_dir: keeps <name>.bin and the decoded <name>.png. batch_size: neighbours of equal size that
    are coded together. meta: what the table should say, as lmbda, steps, steps_source (of the
    paper's recipe). rate: the operating point of a variable-rate model. Under torchrun each process
    codes a part; all return the whole result.
    """
    model.eval()
    rate = rate or {}
    device = next(model.parameters()).device
    fingerprint = bitstream.fingerprint(model)
    names = image_names(paths)
    mine = paths[runs.rank() :: runs.world()]
    rows: list[dict[str, Any]] = []
    warm = False
    with (tempfile.TemporaryDirectory() as scratch,
          tqdm(total=len(mine), desc=name, unit="image", leave=False, disable=None) as bar):
        folder = Path(out_dir or scratch)
        for batch, images in data.batches(mine, batch_size):
            group = [names[p] for p in batch]
            x = data.to_float(images.to(device))
            if not warm:
                files = encode_images(model, x, tag, fingerprint, **rate)
                decode_images(model, files, tag, fingerprint)
                warm = True
            files, encoding = timed(
                lambda x=x: encode_images(model, x, tag, fingerprint, **rate), device)
            for stem, file in zip(group, files, strict=True):
                runs.write_atomic(folder / f"{stem}.bin", file)
            files = [bitstream.read(folder / f"{stem}.bin") for stem in group]
            x_hat, decoding = timed(
                lambda files=files: decode_images(model, files, tag, fingerprint), device)
            small = x.shape[-2] * x.shape[-1] <= LIMIT  # forward of a larger one would not fit
            estimates = (_estimate(model, x, rate) if entropy_estimation and small
                         else [None] * len(group))
            decoded = data.to_uint8(x_hat).cpu()
            for i, stem in enumerate(group):
                if out_dir:
                    data.write_image(decoded[i], folder / f"{stem}.png")
                times = {"encoding_time": encoding / len(group),
                         "decoding_time": decoding / len(group), "bpp_estimated": estimates[i]}
                rows.append(row(stem, images[i], decoded[i], len(files[i])) | times)
            bar.update(len(group))
    shares: list[Any] = [rows]
    if runs.world() > 1:
        shares = [None] * runs.world()
        dist.all_gather_object(shares, rows)
    order = {stem: i for i, stem in enumerate(names.values())}
    rows = sorted((r for share in shares for r in share), key=lambda r: order[r["image"]])
    info = getattr(model, "info", {})
    facts = {key: getattr(model, key) for key in ("N", "M") if hasattr(model, key)} | {
        "lmbda": info.get("config", {}).get("lmbda"), "steps": info.get("step"),
        "trained_on": info.get("hardware"), "fingerprint": fingerprint.hex(), "device": device.type,
        "hardware": runs.describe(device), "torch": torch.__version__,
        "compressai": compressai.__version__}
    known = {key: value for key, value in facts.items() if value is not None}
    return point(name, description, rows, known | (meta or {}))


@torch.no_grad()
def estimated(model: nn.Module, paths: list[Path], name: str, multiple: int,
              meta: dict[str, Any], rate: dict[str, Any] | None = None) -> dict[str, Any]:
    """An operating point without files: bits that the likelihoods promise, no times.

    multiple: of which images are padded to. A row also has the bits of each latent.
    """
    rows = []
    model.eval()
    meta = meta | {"fingerprint": bitstream.fingerprint(model).hex()}
    names = image_names(paths)
    for path, batch in data.batches(paths, 1):
        x = data.to_float(batch.to(next(model.parameters()).device))
        output = model(pad(x, multiple), **(rate or {}))
        bits = {key: float(-p.double().log2().sum()) for key, p in output["likelihoods"].items()}
        x_hat = data.to_uint8(crop(output["x_hat"], x.shape[-2:])[0]).cpu()
        found = row(names[path[0]], batch[0], x_hat, math.ceil(sum(bits.values()) / 8))
        rows.append(found | {"bpp_estimated": found["bpp"]}
                    | {f"{key}_bits": value for key, value in bits.items()})
    return point(name, "no files: bits of the likelihoods", rows, meta)


def in_half(module: nn.Module, device: torch.device) -> None:
    """Run a transform in float16; not one that must decode on every machine."""
    forward = torch.autocast(device.type, torch.float16)(module.forward)
    module.forward = lambda x: forward(x).float()


def image_names(paths: list[Path]) -> dict[Path, str]:
    """What results call each image: its stem, or the whole name where stems are equal."""
    unique = len({p.stem for p in paths}) == len(paths)
    return {p: p.stem if unique else p.name for p in paths}


def row(image: str, x: Tensor, x_hat: Tensor, num_bytes: int,
        ms_ssim: bool = True) -> dict[str, Any]:
    """Measures of one image: uint8 original and decoded (3, H, W), and its file's size."""
    height, width = x.shape[-2:]
    return {"image": image, "height": height, "width": width, "bytes": num_bytes,
            "bpp": metrics.bpp(num_bytes, height, width), "psnr-rgb": metrics.psnr(x, x_hat),
            "ms-ssim-rgb": metrics.ms_ssim(x, x_hat) if ms_ssim else None}


def point(name: str, description: str, rows: list[dict[str, Any]], meta: dict[str, Any]
          ) -> dict[str, Any]:
    """One operating point from the rows of its images: their means."""
    if not rows:
        raise UserError("there are no images to evaluate: name a folder that holds some")
    results = {key: [_mean([r.get(key) for r in rows])] for key in MEASURES}
    return {"name": name, "description": description, "results": results,
            "meta": {key: [value] for key, value in (meta | {"images": len(rows)}).items()},
            "per_image": [rows]}


def merge(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Several results of one codec as one, sorted by rate; name and text are the first one's."""
    parts = [(p["results"]["bpp"][i], p, i) for p in points
             for i in range(len(p["results"]["bpp"]))]
    parts.sort(key=lambda part: part[0])

    def gather(block: str) -> dict[str, list[Any]]:
        keys = dict.fromkeys(key for p in points for key in p[block])
        return {key: [p[block][key][i] if key in p[block] else None for _, p, i in parts]
                for key in keys}

    return {"name": points[0]["name"], "description": points[0]["description"],
            "results": gather("results"), "meta": gather("meta"),
            "per_image": [p["per_image"][i] for _, p, i in parts]}


def save_json(path: str | Path, results: dict[str, Any]) -> None:
    """Write results, each image's row on a line of its own, numbers with eight digits."""
    runs.write_atomic(path, (_format(results, "") + "\n").encode())


def load_json(path: str | Path) -> dict[str, Any]:
    """Read results of one codec; UserError when the file holds something else."""
    return _checked(_parse(path), path)


def load_published(path: str | Path) -> list[dict[str, Any]]:
    """The curves of a published.json; UserError when the file holds something else."""
    content = _parse(path)
    curves = content.get("curves") if isinstance(content, dict) else None
    if not isinstance(curves, list):
        raise UserError(f"{path}: not published curves, there are no \"curves\" in it")
    return [_checked(curve, path) for curve in curves]


def _parse(path: str | Path) -> Any:
    try:
        return json.loads(bitstream.read(path))
    except ValueError as e:
        raise UserError(f"{path}: not a results JSON ({e})") from None


def _checked(curve: Any, path: str | Path) -> dict[str, Any]:
    """`curve` if it has a name, and rates and PSNRs (numbers or null) in lists of equal length."""
    try:
        name, lists = curve["name"], [curve["results"][key] for key in ("bpp", "psnr-rgb")]
        numbers = [v for values in lists for v in values if v is not None]
        good = (isinstance(name, str) and all(isinstance(v, (int, float)) for v in numbers)
                and len(lists[0]) == len(lists[1]) > 0 and None not in lists[0])
    except (TypeError, KeyError, AttributeError):
        good = False
    if not good:
        raise UserError(f"{path}: not a results JSON: it needs a name, and bpp and psnr-rgb as "
                        "lists of equal length (published.json goes to --published)")
    return curve


# -------------------------------------------------------------------------------------- helpers
def timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    result = function()
    return result, now() - start


@torch.no_grad()
def _estimate(model: nn.Module, x: Tensor, rate: dict[str, Any] | None = None) -> list[float]:
    """Bits per original pixel that the likelihoods promise, for each image of x (B, 3, H, W)."""
    likelihoods = model(pad(x, model.downsampling_factor), **(rate or {}))["likelihoods"].values()
    bits = sum(-p.double().log2().sum(dim=(1, 2, 3)) for p in likelihoods)
    return (bits / (x.shape[-2] * x.shape[-1])).tolist()


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def _format(value: Any, indent: str) -> str:
    """JSON: what holds other lists or dicts is spread over lines, the rest stays on one."""
    if isinstance(value, float):
        return f"{value:.8g}" if math.isfinite(value) else "null"
    if not isinstance(value, (dict, list, tuple)):
        return json.dumps(value)
    items = list(value.values()) if isinstance(value, dict) else value
    nested = any(isinstance(item, (dict, list, tuple)) for item in items)
    inner = indent + " " if nested else ""
    texts = [_format(item, inner) for item in items]
    if isinstance(value, dict):
        texts = [f"{json.dumps(k)}: {t}" for k, t in zip(value, texts, strict=True)]
    joint = f",\n{inner}" if nested else ", "
    body = f"\n{inner}{joint.join(texts)}\n{indent}" if nested else joint.join(texts)
    return f"{{{body}}}" if isinstance(value, dict) else f"[{body}]"
