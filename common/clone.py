"""Let a script of a paper's folder find this clone, installed or not.

`python train.py` looks for `common` in its own folder first, where common.py runs this file. It
replaces that module by the package `common` of the same clone, or says what is not installed.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.modules.pop("common", None)
try:
    importlib.import_module("common")
except ImportError as e:
    if type(e).__name__ != "NotInstalled":  # common/installed.py; not imported without `common`
        raise
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)
