"""A tree with one paper and a folder of small images, which `python -m common.comparison` takes."""

from common import data
from common.papers import ROOT

import forks

PAPER = "checkerboard"  # two latents, and y in two passes


def tree(folder):
    """A root that holds one paper of the repository, with its bundled weights."""
    root = folder / "root"
    root.mkdir()
    (root / PAPER).symlink_to(ROOT / PAPER)
    return root


def images(folder):
    """Two crops of Kodak, large enough for MS-SSIM, and a broken file."""
    folder.mkdir()
    for name, rows in (("kodim05", 176), ("kodim21", 192)):
        x = data.read_image(data.KODAK / f"{name}.png")[:, 100:100 + rows, 100:308]
        data.write_image(x.contiguous(), folder / f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "kodim05.png").read_bytes()[:500])
    return folder


def run_in_fork(command, home, root, curve, quiet=False):
    """In place of `report.run`: without another start of Python."""
    forks.run(*command, cwd=home)
