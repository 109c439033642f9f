"""Let a script of a paper's folder find this clone, installed or not.

`python train.py` looks for `common` in its own folder first, where common.py runs this file. It
replaces that module by the package `common` of the same clone, or says what is not installed.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

NEEDED = ("torch", "numpy", "scipy", "compressai", "timm", "pytorch_msssim", "bjontegaard",
          "einops", "yaml", "tensorboard", "PIL", "matplotlib", "tqdm")

ROOT = Path(__file__).resolve().parents[1]
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    print(f"error: {sys.executable} has no {', '.join(missing)}: run `make setup` in {ROOT} and "
          f"use {ROOT / '.venv' / 'bin' / 'python'}; or, in an environment of your own, run `pip "
          f"install -r requirements.txt && pip install -e .` in {ROOT}", file=sys.stderr)
    sys.exit(2)
sys.path.insert(0, str(ROOT))
sys.modules.pop("common", None)
importlib.import_module("common")
