"""The weights that CompressAI publishes: downloaded once, and saved as a checkpoint of ours.

    python eval.py --pretrained 1 2 3        qualities of compressai.zoo, trained for MSE
    python codec.py encode IN.png --pretrained ms-ssim-3

A file comes from the address in compressai.zoo, its hash is checked, and it is kept where
torch.hub keeps files. A paper names the architecture of the zoo that has its layers.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from common import UserError
from common.coding.contract import Codec
from common.coding.model_file import coding_state, load_checkpoint, load_model, save_checkpoint

import torch
from compressai.zoo import image as published

FOLDER = Path("ckpts", "pretrained")  # of the converted checkpoints
TIMEOUT = 30  # seconds without an answer
METRICS = ("mse", "ms-ssim")
# CompressAI's, by quality
LMBDAS = {"mse": (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483, 0.0932, 0.18),
          "ms-ssim": (2.4, 4.58, 8.73, 16.64, 31.73, 60.5, 115.37, 220.0)}
Weights = dict[str, torch.Tensor]


def quality(text: str) -> str:
    """A type for argparse: "3", or "ms-ssim-3" for weights that were trained for MS-SSIM."""
    if not re.fullmatch(r"(ms-ssim-)?[1-8]", text):
        raise ValueError(text)
    return text


def add_flag(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add --pretrained, with one quality or with `several`."""
    how: dict[str, Any] = {"nargs": "+"} if several else {}
    parser.add_argument("--pretrained", type=quality, metavar="QUALITY", **how,
                        help="CompressAI's published weights of this quality, 1 to 8, or "
                        "ms-ssim-1 to ms-ssim-8; downloaded once")


def use(args: argparse.Namespace, architecture: str, kind: type[Codec],
        adapt: Callable[[Weights], Weights] = dict) -> None:
    """Set --checkpoint to the converted weights that --pretrained names, if it is given."""
    if not args.pretrained:
        return
    for other in ("checkpoint", "load_model_epoch", "reproduce"):
        value = getattr(args, other, None)
        if value is not None and value is not False:  # epoch 0 is given
            raise UserError(f"--pretrained, --{other}: give one of them")
    if isinstance(args.pretrained, str):
        args.checkpoint = convert(architecture, args.pretrained, kind, adapt)
    else:
        args.checkpoint = [convert(architecture, q, kind, adapt) for q in args.pretrained]


def start(args: argparse.Namespace, architecture: str, given: str | None) -> str | None:
    """The file that a training starts from: that of --pretrained, whose N and M become those of
    args, or `given` by another flag.
    """
    if not args.pretrained:
        return given
    if given:
        raise UserError(f"--pretrained {args.pretrained}: the run starts from {given} already; "
                        "give one of them")
    path = download(architecture, args.pretrained)
    widths: tuple[int, ...] = published.cfgs[architecture][  # type: ignore[index]  # a dict
        int(args.pretrained[-1])]
    args.N, args.M = args.N or widths[0], args.M or widths[-1]
    return str(path)


def convert(architecture: str, wanted: str, kind: type[Codec],
            adapt: Callable[[Weights], Weights] = dict) -> Path:
    """Return a checkpoint of ours with published weights, after downloading them if needed.

    It keeps their CDF tables and adds the settings of the exact arithmetic, so its files decode
    wherever this checkpoint is. adapt(weights) adds weights that only the paper's model has.
    """
    metric, number = metric_of(wanted), int(wanted[-1])
    path = FOLDER / f"{kind.__name__}-{architecture}-{metric}-{number}.pth"
    if path.exists():
        return path
    original = download(architecture, wanted)
    state = load_checkpoint(original)
    state = {"model": adapt(state["model"])}
    model = load_model(original, kind, state=state)
    save_checkpoint(path, {**coding_state(model), "config": {
        "lmbda": LMBDAS[metric][number - 1], "metric": metric, "pretrained": original.name}})
    print(f"{path}: converted from {original}")
    return path


def metric_of(wanted: str) -> str:
    return METRICS[wanted.startswith(METRICS[1])]


def download(architecture: str, wanted: str) -> Path:
    """Return the published file; its name ends with the beginning of its hash, which is checked."""
    url = published.model_urls[architecture][metric_of(wanted)].get(int(wanted[-1]))
    if url is None:
        raise UserError(f"--pretrained {wanted}: {architecture} is published with qualities 1 to "
                        f"{max(published.model_urls[architecture][metric_of(wanted)])}")
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    found = re.search(r"-([a-f0-9]{8,})\.", path.name)
    prefix = found[1] if found else ""
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest().startswith(prefix):
        return path
    before = socket.getdefaulttimeout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(TIMEOUT)
        torch.hub.download_url_to_file(url, str(path), prefix, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as e:
        reason = " ".join(str(e).split())[:120] or type(e).__name__
        raise UserError(f"--pretrained {wanted}: cannot download {url} ({reason}): put the file "
                        f"into {path.parent}, or name weights with --checkpoint") from None
    finally:
        socket.setdefaulttimeout(before)
    return path
