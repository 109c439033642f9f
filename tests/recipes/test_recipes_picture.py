"""The picture of a paper's page: original, JPEG and ours side by side."""

import io
import shutil

from common import data
from common.evaluation.results import save_results
from common.recipes import picture

import numpy as np
from PIL import Image

KODAK = sorted(data.KODAK.glob("kodim*.png"))


def test_three_crops_at_equal_bytes(tmp_path):
    source = next(path for path in KODAK if path.stem == picture.IMAGE)
    image = Image.open(source).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=30)
    size = len(buffer.getvalue())
    points = {rate: [{"image": picture.IMAGE, "bytes": size + 9 * (rate > 0.3)}]
              for rate in (0.2, 0.9)}
    for rate, rows in points.items():  # the point of 0.2 bpp is the nearer one
        folder = tmp_path / "output" / str(rate)
        save_results(folder / "results.json", content([rate], [rows]))
        shutil.copy(source, folder)
    results = content([*points], [*points.values()])
    picture.write(tmp_path / "x.webp", results, tmp_path / "output", [source])
    found = np.asarray(Image.open(tmp_path / "x.webp").convert("RGB")).astype(int)
    assert found.shape == (picture.HEAD + picture.SIDE, 3 * picture.SIDE + 2 * picture.GAP, 3)
    crops = [found[picture.HEAD:, i * (picture.SIDE + picture.GAP):][:, :picture.SIDE]
             for i in range(3)]
    box = (picture.LEFT, picture.TOP, picture.LEFT + picture.SIDE, picture.TOP + picture.SIDE)
    right = [np.asarray(x.crop(box)).astype(int) for x in (image, Image.open(buffer), image)]
    for crop, expected in zip(crops, right, strict=True):
        assert abs(crop - expected).mean() < 3  # WebP of quality 92
    assert abs(crops[1] - right[0]).mean() > 3


def test_without_the_image_there_is_no_picture(tmp_path):
    other = [path for path in KODAK if path.stem != picture.IMAGE]
    picture.write(tmp_path / "x.webp", content([0.2], [[]]), tmp_path, other)
    assert not (tmp_path / "x.webp").exists()


def content(rates, rows):
    return {"name": "small", "results": {"bpp": rates, "psnr-rgb": [30.0] * len(rates)},
            "meta": {}, "per_image": rows}
