"""What is missing from this environment, in one line; nothing but the standard library is imported.

`fault` costs a few milliseconds and runs before torch, timm or CompressAI is imported, whose own
errors for these cases are long and name no remedy.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

NEEDED = ("torch", "numpy", "scipy", "compressai", "timm", "pytorch_msssim", "bjontegaard",
          "einops", "yaml", "tensorboard", "PIL", "matplotlib", "tqdm")
DISTRIBUTION = {"pytorch_msssim": "pytorch-msssim", "yaml": "pyyaml", "PIL": "pillow"}
COMPRESSAI = "compressai==1.2.8"
OLDEST_TORCH = (2, 6)
PIP = f"{sys.executable} -m pip install"
ROOT = Path(__file__).resolve().parents[1]


class NotInstalled(ImportError):
    """One line that says which packages are missing or do not match, and what to type."""


def fault() -> str:
    """What is wrong with the packages and how to correct it; an empty string if nothing is."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing == ["compressai"]:
        return (f"{sys.executable} has no compressai: run `{PIP} --no-deps {COMPRESSAI}`, which "
                "needs a C++17 compiler where there is no wheel (Python 3.13 and newer, Linux on "
                "ARM, Windows)")
    if missing:
        names = [DISTRIBUTION.get(name, name) for name in missing]
        return f"{sys.executable} has no {', '.join(missing)}: {remedy(*names)}"
    torch, torchvision = _metadata("torch"), _metadata("torchvision")
    found = re.search(r"^Version: (([0-9.]+)\S*)", torch, re.MULTILINE)
    if not found:  # imported from a source tree: its owner knows
        return ""
    upgrade = remedy("--upgrade", "torch", "torchvision")
    if tuple(map(int, re.findall(r"\d+", found[2])[:2])) < OLDEST_TORCH:
        return (f"{sys.executable} has torch {found[1]}, but {'.'.join(map(str, OLDEST_TORCH))} or "
                f"newer is needed: {upgrade}")
    # torchvision is not needed, but timm and CompressAI may import it.
    wanted = re.search(r"^Requires-Dist: torch\s*\(?==([0-9.]+)", torchvision, re.MULTILINE)
    if wanted and found[2] != wanted[1]:
        return (f"torchvision is for torch {wanted[1]}, but {sys.executable} has torch {found[1]}: "
                f"{upgrade}")
    return ""


def _metadata(name: str) -> str:
    """The METADATA of a distribution, as text."""
    try:
        return metadata.distribution(name).read_text("METADATA") or ""
    except metadata.PackageNotFoundError:
        return ""


def remedy(*words: str) -> str:
    """What to type: in a checkout, or, with the `words` for pip, where the wheel is installed."""
    if not (ROOT / "Makefile").exists():
        return f"run `{PIP} {' '.join(words)}`"
    return (f"run `make setup` in {ROOT} and use {ROOT / '.venv' / 'bin' / 'python'}; or, in an "
            f"environment of your own, run `pip install -r requirements.txt && pip install "
            f"--no-deps -r requirements-nodeps.txt -e .` in {ROOT}")
