"""Code one image with bundled weights and measure what the page shows; without Gradio."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import UserError, data, metrics
from common.coding import bitstream, codecs, image_file, stages
from common.coding.contract import Codec
from common.coding.tiles import LIMIT
from common.comparison.viewer import where_bits_go

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 16_000_000  # of an image: a photograph of a phone has 12 million
CACHED = 3  # models that are kept in memory, those used last
Progress = Callable[[float, str], None]  # share that is done, and what comes next
_loading = threading.Lock()


@dataclass(frozen=True)
class Loaded:
    """A codec that is ready to code, and the fingerprint of its weights."""

    model: Codec
    fingerprint: bytes


@dataclass(frozen=True)
class Result:
    """An image that was coded, written to a file and decoded from it.

    original, decoded: uint8 (3, H, W). rate: what the operating point of a variable-rate model is
    called, with its value. seconds: "read", "compress" and "decompress", which contain the parts
    in `compress` and `decompress` (`common.coding.stages`). bits: of `where_bits_go`, and latents:
    y_hat (M, h, w) as g_s receives it; None for images of more than `tiles.LIMIT` pixels, as they
    need the whole image in memory at once.
    """

    name: str
    file: bytes
    original: Tensor
    decoded: Tensor
    rate: str
    notices: list[str]
    seconds: dict[str, float]
    compress: dict[str, float]
    decompress: dict[str, float]
    bits: dict[str, Any] | None = None
    latents: Tensor | None = field(default=None, repr=False)

    @property
    def bpp(self) -> float:
        return metrics.bpp(len(self.file), *self.original.shape[-2:])

    @property
    def psnr(self) -> float:
        return metrics.psnr(self.original, self.decoded)

    @property
    def ms_ssim(self) -> float:
        return metrics.ms_ssim(self.original, self.decoded)


def choices() -> dict[str, list[str]]:
    """The papers with bundled weights, and the names of these weights."""
    names = {paper: list(codecs.bundled(codecs.weights_folder(paper))) for paper in codecs.papers()}
    return {paper: found for paper, found in names.items() if found}


def default_weights(paper: str) -> str:
    """The name of the bundled weights that codec.py takes if none is given."""
    folder = codecs.weights_folder(paper)
    chosen = codecs.choose(folder, prefix=codecs.default_prefix(paper))
    return next(name for name, path in codecs.bundled(folder).items() if path == chosen)


def without_weights() -> list[str]:
    """The papers without bundled weights."""
    known = choices()
    return [paper for paper in codecs.papers() if paper not in known]


def load(paper: str, weights: str) -> Loaded:
    """Return the codec with these bundled weights; the CACHED ones used last are kept.

    Raises UserError for a paper or weights that there are not.
    """
    codecs.check_paper(paper)
    if not codecs.bundled(codecs.weights_folder(paper)):
        raise UserError(f"{paper} has no bundled weights: choose another paper, or train some with "
                        f"`make weights-{paper}`")
    path = codecs.choose(codecs.weights_folder(paper), weights)
    with _loading:
        return _load(paper, path)


@functools.lru_cache(maxsize=CACHED)
def _load(paper: str, path: Path) -> Loaded:
    """Load weights; a small image prepares what the first file would otherwise wait for."""
    model = codecs.loader(paper)(path, torch.device("cpu"))
    fingerprint = bitstream.fingerprint(model)
    grey = torch.full((3, model.downsampling_factor, model.downsampling_factor), 0.5)
    file = image_file.encode_image(model, grey, fingerprint, **rate_at(model, 0.5))
    image_file.decode_image(model, file, fingerprint)
    return Loaded(model, fingerprint)


def rate_at(model: Codec, position: float) -> dict[str, float]:
    """The arguments of `compress` at a position from 0 to 1 of the model's range of rates; {} for a
    model with one rate.
    """
    rates = model.rate_range()
    return {rates.name: rates.at(position)} if rates else {}


def describe_rate(model: Codec, position: float) -> str:
    """The operating point as text, such as "lmbda 0.0067"; an empty string for a model with one."""
    return ", ".join(f"{name} {value:.4g}" for name, value in rate_at(model, position).items())


def read(path: Path, notice: Callable[[str], None]) -> Tensor:
    """Read an image as uint8 (3, H, W).

    Raises UserError if it is no image or has more than MAX_PIXELS, by its header.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise UserError(f"{path.name}: is not an image in a known format, such as PNG, JPEG, WebP "
                        "or TIFF; drop another file") from None
    except Exception:  # whatever else Pillow raises: `read_image` says what is wrong
        width = height = 0
    if width * height > MAX_PIXELS:
        raise UserError(f"{path.name}: has {width}x{height} pixels, which are "
                        f"{width * height / 1e6:.0f} million; this page codes images of up to "
                        f"{MAX_PIXELS / 1e6:g} million: scale it down, or use `licodecs encode`")
    return data.read_image(path, notice, path.name)


def code(path: str | Path, paper: str, weights: str, position: float = 0.5,
         progress: Progress = lambda share, text: None) -> Result:
    """Code an image file with bundled weights, decode the file, and measure.

    position: that of the rate in the range of a variable-rate model, from 0 to 1. Raises UserError.
    """
    path = Path(path)
    seconds: dict[str, float] = {}
    notices: list[str] = []

    def timed(name: str, share: float, function: Callable[[], Any]) -> Any:
        progress(share, name)
        start = time.perf_counter()
        result = function()
        seconds[name] = time.perf_counter() - start
        return result

    original = timed("read", 0.0, lambda: read(path, notices.append))
    progress(0.05, "load the weights")
    loaded = load(paper, weights)
    model, fingerprint = loaded.model, loaded.fingerprint
    x, rate = data.to_float(original), rate_at(model, position)
    with stages.measure(model) as compressing:
        file = timed("compress", 0.1,
                     lambda: image_file.encode_image(model, x, fingerprint, **rate))
    with stages.measure(model) as decompressing:
        x_hat = timed("decompress", 0.4,
                      lambda: image_file.decode_image(model, file, fingerprint))
    bits = latents = None
    if original[0].numel() <= LIMIT:
        progress(0.7, "see where the bits go")
        bits, latents = _inside(model, original, file)
    else:
        notices.append(f"{path.name}: the maps and the parts of the rate are only shown for images "
                       f"of up to {LIMIT / 1e6:g} million pixels")
    progress(0.9, "measure")
    return Result(path.name, file, original, data.to_uint8(x_hat), describe_rate(model, position),
                  notices, seconds, compressing, decompressing, bits, latents)


def _inside(model: Codec, original: Tensor, file: bytes) -> tuple[dict[str, Any], Tensor]:
    """Where the bits of a file go, and y_hat (M, h, w) as g_s receives it, without padding."""
    seen: list[Tensor] = []
    first = stages.parts(model.g_s)[0]
    hook = first.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].detach()))
    try:
        bits = where_bits_go(model, original, file)
    finally:
        hook.remove()
    return bits, seen[-1][:, : bits["map"]["height"], : bits["map"]["width"]]
