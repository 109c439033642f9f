"""Process large images in bounded memory: a fully convolutional transform, tile by tile."""

from collections.abc import Callable

from torch import Tensor

LIMIT = 4_000_000  # image pixels; larger images are processed in tiles


def tiled(
    transform: Callable[[Tensor], Tensor],
    x: Tensor,
    down: int = 1,
    up: int = 1,
    halo: int = 2,
    tile: int = 1024,
    limit: float = LIMIT,
) -> Tensor:
    """Apply transform to x (B, C, H, W), in overlapping tiles above `limit` image pixels.

    The first layer of g_a has 128 channels or more at half the resolution of the image: 6 GB for an
    8000x6000 image, and several times as much with GDN. A tile of 1024x1024 takes 0.15 GB.

    down: image pixels of x per row of the result (16 for g_a); H and W must be multiples of it.
    up:   rows of the result per row of x (16 for g_s).
    halo: margin around a tile in latent positions, i.e. `down` pixels of x, or one row of x for
        `up`.
    tile: side of a tile in image pixels, without its halo.

    At the border of the image a tile has no halo, because the layers pad with zeros there in any
    case. Elsewhere, the halo must cover the receptive field. Four 5x5 layers of stride 2 see
    2 + 4 + 8 + 16 = 30 pixels on each side, less than two latent positions of 16 pixels, and so
    does g_s, the mirrored network. So halo=2 gives the result of the whole image for both, up to
    float rounding. A transform with more layers needs a larger halo; one with a global receptive
    field (attention, squeeze-and-excitation) cannot be tiled.
    """
    height, width = x.shape[-2:]
    if height * width * up * up <= limit:
        return transform(x)
    # In latent positions; `down` and `up` convert them to rows of x and of the result.
    rows, columns, step = height // down, width // down, max(1, tile // (down * up))
    out: Tensor | None = None
    for top in range(0, rows, step):
        for left in range(0, columns, step):
            bottom, right = min(top + step, rows), min(left + step, columns)
            above, before = max(top - halo, 0), max(left - halo, 0)
            below, after = min(bottom + halo, rows), min(right + halo, columns)
            y = transform(x[..., above * down : below * down, before * down : after * down])
            if out is None:
                out = y.new_empty(*y.shape[:2], rows * up, columns * up)
            out[..., top * up : bottom * up, left * up : right * up] = y[
                ...,
                (top - above) * up : (bottom - above) * up,
                (left - before) * up : (right - before) * up,
            ]
    assert out is not None  # the image has at least one tile
    return out
