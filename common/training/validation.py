"""Validation during training: whole images or central crops, and mean losses over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from common import UserError, data
from common.coding.contract import Codec
from common.coding.image_file import crop, pad
from common.datasets import Item
from common.loss import RateDistortionLoss, check_size
from common.training.log import Log

import torch
from torch import Tensor


def check_images(metric: str, images: Iterable[Item], patch_size: int) -> None:
    """Raise UserError if a crop or a validation image is too small for the metric or unreadable.

    This reports a mistake before the training starts, not hours later.
    """
    check_size(metric, (patch_size, patch_size))
    for image in images:
        check_size(metric, image.read().shape[-2:], image.path)


def central_crops(images: Iterable[Item], size: Sequence[int], flag: str) -> Tensor:
    """Central crops of images, uint8 (n, 3, *size), size = (height, width).

    UserError names an image that is smaller; flag: the flag that sets the size.
    """
    crops = []
    for image in images:
        x = image.read()
        if x.shape[1] < size[0] or x.shape[2] < size[1]:
            raise UserError(f"{image.name}: {x.shape[2]}x{x.shape[1]} is smaller than the "
                            f"{size[1]}x{size[0]} crop; remove it or set a smaller {flag}")
        crops.append(data.centre(x, size[0], size[1]))
    return torch.stack(crops)


def central_parts(images: Iterable[Item], size: Sequence[int], multiple: int = 64) -> list[Tensor]:
    """Central parts of images, uint8 (3, h, w): `size` or less, in whole multiples of `multiple`.

    UserError names an image that is smaller than one multiple.
    """
    parts = []
    for image in images:
        x = image.read()
        height, width = (min(side, limit) // multiple * multiple
                         for side, limit in zip(x.shape[1:], size, strict=True))
        if min(height, width) == 0:
            raise UserError(f"{image.name}: {x.shape[2]}x{x.shape[1]} is too small to validate "
                            "with; remove it")
        parts.append(data.centre(x, height, width))
    return parts


@torch.no_grad()
def validate(model: Codec, test: list[Item], batch_size: int, criterion: RateDistortionLoss,
             device: torch.device, log: Log, step: int) -> dict[str, float]:
    """Mean losses over whole images, quantised as in coding, with estimated rate; in float32.

    The losses and the last image with its reconstruction are logged to TensorBoard.
    """
    model.eval()
    sums: dict[str, float] = {}
    for _, images in data.batches(test, batch_size):
        x = data.to_float(images.to(device))
        output = model(pad(x, model.downsampling_factor))
        output["x_hat"] = crop(output["x_hat"], x.shape[-2:])
        losses = criterion(output, x)
        error = (output["x_hat"].clamp(0, 1) - x).square().mean(dim=(1, 2, 3))
        losses["psnr"] = -10 * error.log10().mean()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(x) / len(test)
    log.images(x[-1], output["x_hat"][-1], step)
    log.scalars("test", sums, step)
    return sums
