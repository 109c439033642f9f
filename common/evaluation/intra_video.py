"""Code single images with the intra modes of HEVC and VVC, by the ffmpeg of imageio-ffmpeg.

Colours are converted here, in floating point with one rounding each way (BT.709, full range), and
not by ffmpeg, whose fast conversion costs up to a decibel at high rates. Files are raw bitstreams
without a container; their parameter sets count.
"""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import UserError

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KR, KB = 0.2126, 0.0722  # BT.709
QUIET = ("-hide_banner", "-loglevel", "error", "-nostdin", "-y")


@functools.cache
def ffmpeg() -> str:
    """Path of the ffmpeg program that imageio-ffmpeg brings."""
    return str(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())


@functools.cache
def version() -> str:
    """Its name and version, as in "ffmpeg 7.1"."""
    lines = subprocess.run([ffmpeg(), "-version"], capture_output=True, text=True,
                           check=True).stdout
    return f"ffmpeg {lines.split()[2]}"


@functools.cache
def has_encoder(name: str) -> bool:
    """Whether it was built with this encoder; that of imageio-ffmpeg 0.6 has none for VVC."""
    lines = subprocess.run([ffmpeg(), "-hide_banner", "-encoders"], capture_output=True, text=True,
                           check=True).stdout.splitlines()
    return any(line.split()[1:2] == [name] for line in lines)


def to_ycbcr(x: Tensor) -> Tensor:
    """RGB x (3, H, W), uint8 -> Y in [0, 1], Cb and Cr in [-1/2, 1/2], float64."""
    r, g, b = x.double() / 255
    y = KR * r + (1 - KR - KB) * g + KB * b
    return torch.stack([y, (b - y) / (2 - 2 * KB), (r - y) / (2 - 2 * KR)])


def to_rgb(ycbcr: Tensor) -> Tensor:
    """Inverse of `to_ycbcr`, rounded to uint8."""
    y, cb, cr = ycbcr
    r, b = y + (2 - 2 * KR) * cr, y + (2 - 2 * KB) * cb
    g = (y - KR * r - KB * b) / (1 - KR - KB)
    return (255 * torch.stack([r, g, b])).round().clamp(0, 255).to(torch.uint8)


def to_planes(x: Tensor, bits: int, subsample: bool) -> bytes:
    """Planes Y, Cb and Cr of x (3, H, W), uint8, in samples of `bits` bits, full range.

    subsample: chroma is the mean of 2x2 pixels; H and W must be even then.
    """
    ycbcr, peak = to_ycbcr(x), 2**bits - 1
    planes = [ycbcr[:1], ycbcr[1:]]
    if subsample:
        planes[1] = torch.nn.functional.avg_pool2d(planes[1], 2)
    levels = [peak * planes[0], peak * planes[1] + 2 ** (bits - 1)]
    kind = "<u2" if bits > 8 else "u1"
    return b"".join(p.round().clamp(0, peak).numpy().astype(kind).tobytes() for p in levels)


def from_planes(planes: bytes, size: Sequence[int], bits: int, subsample: bool) -> Tensor:
    """Inverse of `to_planes` for an image of size (height, width)."""
    height, width = size
    h, w = (height // 2, width // 2) if subsample else (height, width)
    samples: NDArray[np.float64] = np.frombuffer(planes, "<u2" if bits > 8 else "u1").astype(float)
    if samples.size != height * width + 2 * h * w:
        raise UserError(f"ffmpeg decoded {samples.size} samples instead of "
                        f"{height * width + 2 * h * w}")
    peak = 2**bits - 1
    y = torch.from_numpy(samples[:height * width].reshape(1, height, width)) / peak
    chroma = torch.from_numpy(samples[height * width:].reshape(2, h, w)) - 2 ** (bits - 1)
    if subsample:
        chroma = torch.nn.functional.interpolate(chroma[None], scale_factor=2, mode="bicubic")[0]
    return to_rgb(torch.cat([y, chroma / peak]))


def _code(x: Tensor, pixels: str, bits: int, kind: str, flags: Sequence[str]
          ) -> tuple[bytes, Tensor, float, float]:
    """Code x (3, H, W) by ffmpeg; kind: its name of the bitstream; flags: of the encoder."""
    subsample = "420" in pixels
    height, width = x.shape[-2:]
    # 8 is the smallest coding unit of both; a repeated line costs next to nothing
    padded = torch.nn.functional.pad(x[None].double(), (0, -width % 8, 0, -height % 8),
                                     mode="replicate")[0].to(torch.uint8)
    h, w = padded.shape[-2:]
    with tempfile.TemporaryDirectory() as folder:
        raw, coded, decoded = (Path(folder, name) for name in ("raw.yuv", "coded", "decoded.yuv"))
        raw.write_bytes(to_planes(padded, bits, subsample))
        start = time.perf_counter()
        _run("-f", "rawvideo", "-pix_fmt", pixels, "-s", f"{w}x{h}", "-i", raw, *flags, "-f",
             kind, coded)
        middle = time.perf_counter()
        _run("-f", kind, "-i", coded, "-frames:v", "1", "-pix_fmt", pixels, "-f", "rawvideo",
             decoded)
        end = time.perf_counter()
        x_hat = from_planes(decoded.read_bytes(), (h, w), bits, subsample)
        return coded.read_bytes(), x_hat[:, :height, :width], middle - start, end - middle


def _run(*words: object) -> None:
    done = subprocess.run([ffmpeg(), *QUIET, *map(os.fspath, map(str, words))], capture_output=True,
                          text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"ffmpeg: {reason}")


def hevc(x: Tensor, qp: int) -> tuple[bytes, Tensor, float, float]:
    """HEVC intra by x265 in 4:4:4, 8 bit, at a constant QP."""
    options = f"qp={qp}:keyint=1:ipratio=1:log-level=none:info=0:aq-mode=0:psy-rd=0:psy-rdoq=0"
    return _code(x, "yuv444p", 8, "hevc", ["-c:v", "libx265", "-preset", "slow", "-x265-params",
                                           options])


def vvc(x: Tensor, qp: int) -> tuple[bytes, Tensor, float, float]:
    """VVC intra by VVenC in 4:2:0, 10 bit, at a constant QP."""
    return _code(x, "yuv420p10le", 10, "vvc", ["-c:v", "libvvenc", "-preset", "fast", "-qp",
                                               str(qp), "-qpa", "0", "-period", "1"])
