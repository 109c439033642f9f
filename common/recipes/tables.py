"""Tables of READMEs that a script writes: the lines between a marker and the end of results."""

from __future__ import annotations

from pathlib import Path

from common.files import write_atomic
from common.recipes.pages import END, begin_of


def table_of(page: str, name: str) -> str | None:
    """The table `name` of the page; None if it has none."""
    _, found, rest = page.partition(f"{begin_of(name)}\n")
    table, end, _ = rest.partition(END)
    return table.strip() if found and end else None


def write_table(path: Path, name: str, table: str) -> None:
    """Replace the table `name` of the page `path`; print it if the page has no such table."""
    page = path.read_text()
    if table_of(page, name) is None:
        print(f"{path} has no table after {begin_of(name)}; it would be:", table, sep="\n")
        return
    before, begin, rest = page.partition(f"{begin_of(name)}\n")
    after = rest[rest.index(END):]
    write_atomic(path, f"{before}{begin}\n{table}\n\n{after}".encode())
