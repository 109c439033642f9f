"""The papers of this repository: every folder with a model.py and a train.py is one."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]


def papers(root: Path = ROOT) -> list[str]:
    """Names of the papers' folders, sorted."""
    return sorted(path.parent.name for path in root.glob("*/model.py")
                  if path.with_name("train.py").exists())
