"""Pictures of latents and of bits, as images of Pillow."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

SHOWN = 8  # channels of the latent
WIDTH = 768  # pixels of the map of bits; those of a channel are half as many


def bits_map(bits: dict[str, Any]) -> Image.Image:
    """The bits of y at each latent position, from dark (none) to bright (the most)."""
    found = bits["map"]
    values = torch.tensor(found["bits"]).view(found["height"], found["width"])
    share = (values / values.max().clamp_min(1e-9)).numpy()
    colours = colormaps["inferno"](share, bytes=True)[..., :3]
    return _enlarged(Image.fromarray(colours.copy()), WIDTH)


def latent_channels(latents: Tensor) -> list[tuple[Image.Image, str]]:
    """The SHOWN channels of y_hat (M, h, w) that vary most, each from its lowest value, black, to
    its highest, white, with a caption: the channel and both values.
    """
    variance = latents.double().flatten(1).var(1, correction=0)
    pictures = []
    for channel in variance.argsort(descending=True, stable=True)[:SHOWN].tolist():
        values = latents[channel].float()
        low, high = float(values.min()), float(values.max())
        levels = (values - low) * (255 / max(high - low, 1e-9))
        image = Image.fromarray(levels.round().to(torch.uint8).numpy())
        pictures.append((_enlarged(image, WIDTH // 2), f"{channel}: {low:.3g} to {high:.3g}"))
    return pictures


def _enlarged(image: Image.Image, width: int) -> Image.Image:
    """An image whose pixels are squares, so that it is about `width` pixels wide."""
    factor = max(1, round(width / image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
