"""Pictures of the two pages for the READMEs, by a headless Chromium.

    make compare
    python tests/screenshots.py [output/compare/compare.html] [--into common/results]

Writes page-compare.webp and page-demo.webp: the page of the comparison, and the demo with an image
of Kodak that one of the papers has coded.
"""

import argparse
import io
import re
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from common import UserError, cli, data  # noqa: E402
from common.files import write_atomic  # noqa: E402

import browser  # noqa: E402
import demo_page  # noqa: E402
import forks  # noqa: E402
from PIL import Image  # noqa: E402

SIZE = 1100, 1500  # pixels of the window
COMPARE_HEIGHT = 1100
WIDTH = 900  # pixels of the pictures
PAPER, IMAGE = "checkerboard", "kodim23.png"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", nargs="?", type=Path, default=ROOT / "output/compare/compare.html")
    parser.add_argument("--into", type=Path, default=ROOT / "common/results")
    args = parser.parse_args(argv)
    if not browser.program():
        raise UserError("needs Chromium: apt-get install chromium")
    if not args.page.exists():
        raise UserError(f"{args.page}: does not exist; `make compare` writes it")
    with browser.Browser(args.page.resolve(), SIZE[0], COMPARE_HEIGHT) as page:
        page.wait("document.getElementById('stage')?.dataset.drawn !== undefined")
        keep(page.screenshot(), args.into / "page-compare.webp", COMPARE_HEIGHT)
    keep(demo(), args.into / "page-demo.webp", SIZE[1])


def demo():
    """The demo after an image was coded."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = forks.start("-m", "common.demo", "--no-browser", "--port", str(port), cwd=ROOT)
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+", process.first_line(300))[0]
        with browser.Browser(address, *SIZE) as page:
            demo_page.upload(page, data.KODAK / IMAGE)
            demo_page.choose(page, "paper", PAPER)
            demo_page.encode(page)
            page.wait("[...document.querySelectorAll('#results img')].every((i) => i.complete)")
            return page.screenshot()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(60)


def keep(png, path, height):
    """Write the upper part of a picture of a page as a small WebP file."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image = image.crop((0, 0, image.width, min(height, image.height)))
    image.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=82, method=6)
    write_atomic(path, buffer.getvalue())
    print(f"{path}: {image.width}x{image.height}, {len(buffer.getvalue()):,} bytes")


if __name__ == "__main__":
    cli.run(main)
