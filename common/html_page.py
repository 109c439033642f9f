"""HTML pages of one file that work from disk: data, scripts, styles and Plotly are in the file.

`page/base.*` holds what all pages share: title, links to the sections, notes, light and dark, the
layout on a telephone. A page adds a body of `<section id=... data-name=...>` elements, styles, and
scripts whose last one calls `startPage`.
"""

from __future__ import annotations

import html
import importlib.resources
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BASE = Path(__file__).parent / "page"


def missing() -> str:
    """What must be installed before a page can be written, in words; "" if nothing."""
    return "" if importlib.util.find_spec("plotly") else "pip install plotly"


def assemble(folder: Path, name: str, scripts: Sequence[str], content: dict[str, Any]) -> bytes:
    """The page <name>.html in `folder`, with <name>.css and the scripts, over the base.

    content: the data, which scripts find in DATA; "title" and "notes" (a list of lines) are in it.
    """
    # "</" must not end a script early
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    library = importlib.resources.files("plotly").joinpath("package_data/plotly.min.js")
    parts = {
        "TITLE": html.escape(content["title"]),
        "STYLE": _read(BASE / "base.css", folder / f"{name}.css"),
        "BODY": _read(folder / f"{name}.html"),
        "PLOTLY": library.read_text(encoding="utf-8"), "DATA": text,
        "SCRIPT": _read(BASE / "base.js", *(folder / script for script in scripts))}
    page = (BASE / "base.html").read_text()
    done = ""
    for key, value in parts.items():  # in their order in base.html: what was put in is left alone
        before, _, page = page.partition(f"/*{key}*/")
        done += before + value
    return (done + page).encode()


def _read(*paths: Path) -> str:
    return "\n".join(path.read_text() for path in paths)
