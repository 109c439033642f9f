"""Large images in patches, as the source codes them."""

from __future__ import annotations

from collections.abc import Iterator

from common import UserError
from common.coding import bitstream, image_file

import torch
from torch import Tensor
from torch.nn import functional as F

from convnextic.model import ConvNeXTIC

PATCH = (1088, 1408)  # height, width in the source


def cut(x: Tensor, patch: tuple[int, int], mode: str) -> tuple[list[Tensor], tuple[int, int]]:
    """Patches of x (3, H, W) in raster order, and the position of x in their grid.

    mode: padding of the grid: "continued", with x in the upper left corner; or "zeros", with x in
    the centre, as in the source.
    """
    height, width = x.shape[1:]
    missing = [-height % patch[0], -width % patch[1]]
    top, left = (m // 2 if mode == "zeros" else 0 for m in missing)
    pads = (left, missing[1] - left, top, missing[0] - top)
    x = F.pad(x, pads) if mode == "zeros" else image_file.continued(x[None], *missing)[0]
    return [x[:, i : i + patch[0], j : j + patch[1]]
            for i, j in corners(x.shape[1:], patch)], (top, left)


def clamped(patch: tuple[int | None, int | None], size: tuple[int, int], multiple: int
            ) -> tuple[int, int]:
    """Sides of patches: of the image in multiples of `multiple` where not given or larger."""
    height, width = (min(p or s + multiple, -(-s // multiple) * multiple)
                     for p, s in zip(patch, size, strict=True))
    return height, width


def check_area(x: Tensor, patch: tuple[int, int]) -> None:
    """Raise UserError if x, padded to whole patches, would be too large to be decoded."""
    rows, columns = (-(-s // p) for s, p in zip(x.shape[1:], patch, strict=True))
    if rows * patch[0] * columns * patch[1] > bitstream.MAX_PIXELS:
        raise UserError(f"{rows * columns} patches of {patch[0]}x{patch[1]} are more than "
                        f"{bitstream.MAX_PIXELS} pixels: give smaller -ph and -pw")


def corners(size: tuple[int, int], patch: tuple[int, int]) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(0, size[0], patch[0]) for j in range(0, size[1], patch[1]))


def decode_patches(model: ConvNeXTIC, strings: list[bytes], size: tuple[int, int],
                   patch: tuple[int, int], rate: dict[str, float], centred: int) -> Tensor:
    """Decode x_hat (3, H, W) from the strings of all patches; centred: 1 in the source's format."""
    factor = model.downsampling_factor
    if not all(s > 0 and s % factor == 0 for s in patch):
        raise UserError(f"the file states patches of {patch[0]}x{patch[1]}: encode the image again")
    rows, columns = (-(-s // p) for s, p in zip(size, patch, strict=True))
    full = rows * patch[0], columns * patch[1]
    if full[0] * full[1] > bitstream.MAX_PIXELS:
        raise UserError(f"the file states {rows * columns} patches of {patch[0]}x{patch[1]}, more "
                        f"than the {bitstream.MAX_PIXELS} pixels that can be decoded: encode the "
                        "image again")
    count = strings_of(model)
    if len(strings) != count * rows * columns:
        raise UserError(f"the file holds {len(strings)} strings, {count * rows * columns} are "
                        "needed: it is damaged or of another model")
    grid = None  # allocated after a first patch: damaged files can state any size
    shape = tuple(s // factor for s in patch)
    for k, (i, j) in enumerate(corners(full, patch)):
        mine = [[s] for s in strings[k * count : (k + 1) * count]]
        try:
            x_hat = model.decompress(mine, shape, **rate)["x_hat"]
        except ValueError as e:
            raise UserError(f"the file's content does not decode ({e}): encode the image "
                            "again") from None
        grid = torch.zeros(3, *full) if grid is None else grid
        grid[:, i : i + patch[0], j : j + patch[1]] = x_hat[0].cpu()
    top, left = ((g - s) // 2 * centred for g, s in zip(full, size, strict=True))
    return image_file.check_decoded(grid[:, top : top + size[0], left : left + size[1]])


def strings_of(model: ConvNeXTIC) -> int:
    return 5 if model.context == "mcm" else 2
