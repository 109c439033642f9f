"""Make the training set of the paper: large images, downsampled by 2, as PNG.

    python preprocess.py --imagenet ILSVRC2012/train --clic CLIC2020/train --out ./dataset/train

It uses the `-n` images of ImageNet with the most pixels (8,000) and all of CLIC 2020 professional
(584). Noise is added to each image, it is rounded to 8 bits, downsampled by 2 with a cubic filter
if the shorter side exceeds 512 pixels, and written as PNG.

The source adds noise in [0, 1) to 8-bit values and then truncates them to integers, which has no
effect. `--noise source` does the same. `--noise proper` adds noise in floating point, downsamples,
and rounds at the end, so that it hides traces of JPEG as intended (only in images that are
downsampled, as rounding removes it in others). The filter is Pillow's, bicubic with antialiasing;
the source uses OpenCV's, without antialiasing.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from common import UserError, cli, data, datasets
from common.files import write_atomic

import numpy as np
from PIL import Image
from tqdm import tqdm

LARGEST_SHORT_SIDE = 512


def flags() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--imagenet", type=Path,
                        help="folder of images at any depth; the -n largest are used")
    parser.add_argument("--clic", type=Path, help="folder of images at any depth; all are used")
    parser.add_argument("--out", type=Path, default=Path("dataset/train"), help="folder to write")
    parser.add_argument("-n", type=cli.positive_int, default=8000,
                        help="number of images from --imagenet")
    parser.add_argument("--noise", choices=["source", "proper", "none"], default="source",
                        help="noise added to the images, see the top of this file")
    parser.add_argument("--seed", type=cli.count, default=0, help="seed of the noise")
    parser.add_argument("--num-workers", type=cli.count, default=os.cpu_count(),
                        help="number of processes")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    if not (args.imagenet or args.clic):
        raise UserError("name a folder of images with --imagenet, --clic or both")
    for folder in filter(None, (args.imagenet, args.clic)):
        inside, out = folder.resolve(), args.out.resolve()
        if inside == out or inside in out.parents or out in inside.parents:
            raise UserError(f"--out {args.out}: would mix with the originals in {folder}; name a "
                            "folder apart from them")
    chosen = largest(files(args.imagenet), args.n) if args.imagenet else []
    chosen += files(args.clic) if args.clic else []
    names = unique_names(chosen)
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [(path, args.out / name, args.seed + k)
            for k, (path, name) in enumerate(zip(chosen, names, strict=True))]
    work = partial(convert, noise=args.noise)
    if args.num_workers > 1:
        with ProcessPoolExecutor(args.num_workers) as pool:
            done = list(tqdm(pool.map(work, jobs, chunksize=8), total=len(jobs), unit="image",
                             disable=None))
    else:
        done = [work(job) for job in tqdm(jobs, unit="image", disable=None)]
    print(f"{args.out}: {len(done)} images, {sum(done)} of them halved")


def files(folder: Path) -> list[Path]:
    """Image files at any depth, sorted by name."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = [item.path for item in datasets.images_below(folder).items]
    if not found:
        raise UserError(f"{folder}: holds no images")
    return found


def largest(paths: list[Path], n: int) -> list[Path]:
    """The n images with the most pixels according to their headers, ties in order."""
    if len(paths) < n:
        raise UserError(f"{n} images were asked for, {len(paths)} are there: give a smaller -n")
    sizes = [pixels(path) for path in tqdm(paths, desc="headers", unit="image", disable=None)]
    order = sorted(range(len(paths)), key=lambda i: -sizes[i])  # stable
    return [paths[i] for i in order[:n]]


def pixels(path: Path) -> int:
    """Number of pixels, read from the header alone."""
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not an image that can be read ({e})") from None


def unique_names(paths: Iterable[Path]) -> list[str]:
    """<stem>.png, numbered where stems are equal (the source overwrites the first)."""
    seen: dict[str, int] = {}
    names = []
    for path in paths:
        seen[path.stem] = seen.get(path.stem, 0) + 1
        number = seen[path.stem]
        names.append(f"{path.stem}.png" if number == 1 else f"{path.stem}_{number}.png")
    return names if len(set(names)) == len(names) else [f"{i:06d}_{n}" for i, n in enumerate(names)]


def convert(job: tuple[Path, Path, int], noise: str) -> bool:
    """Convert one image; return whether it was downsampled."""
    path, output, seed = job
    image = data.read_image(path, notice=lambda _: None).permute(1, 2, 0).numpy()
    height, width = image.shape[:2]
    halve = min(height, width) > LARGEST_SHORT_SIDE
    rng = np.random.default_rng(seed)
    if noise == "proper":
        image = image + rng.random(image.shape, dtype=np.float32) - np.float32(0.5)
    elif noise == "source":  # in float64: a float32 draw may round to 1 and 255 wrap around to 0
        image = (image + rng.random(image.shape)).astype(np.uint8)
    if halve:
        planes = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(3)]
        size = (width // 2, height // 2)
        image = np.stack([np.asarray(p.resize(size, Image.Resampling.BICUBIC)) for p in planes], 2)
    image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    write_atomic(output, buffer.getvalue())
    return halve


if __name__ == "__main__":
    cli.run(main)
