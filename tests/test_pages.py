"""The numbers in the tables of the READMEs are those of the results files.

Every table with a column for bpp has a file behind it: results/<name>.json for a table after
`<!-- results: <name> -->`, which may list several names, otherwise the file in UNMARKED. Each of
its rows must equal one record of that file in all columns that the file has, and each record must
have a row. The columns "above JPEG" and of published networks, which `make report-<paper>` derives,
are not computed again here.
"""

import json
import re
from pathlib import Path

from common.papers import papers
from common.recipes.tables import table_of

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"([+-]?[\d,]*\.?\d+)( M)?\**")
UNMARKED = {  # paper, first column -> name of the file, which holds these points, too
    ("qvrf", "level"): "small", ("convnextic", "lmbda"): "small",
    ("advdnic", "in the source's folders"): None}  # numbers of the source, whose folders it names
KEYS = {"bpp": ["bpp"], "test bpp": ["bpp"], "PSNR": ["psnr-rgb", "psnr"],
        "test PSNR": ["psnr-rgb"], "MS-SSIM": ["ms-ssim-rgb"], "steps": ["steps"],
        "lmbda": ["lmbda"], "level": ["level"], "loss": ["loss"], "J": ["J"],
        "train loss": ["train_loss"], "training loss": ["training_loss"],
        "test loss": ["test_loss"], "learning rate": ["lr"], "parameters": ["parameters"],
        "GMACs encoder": ["gmacs_encoder"], "decoder": ["gmacs_decoder"]}


def cells(line):
    return [cell.strip().strip("`*") for cell in line.strip().strip("|").split("|")]


def tables(text):
    """(name after the marker or None, head, rows) of each table."""
    found = []
    form = r"(?:<!-- results(?:: ([\w, -]+))? -->\n\n?)?((?:^\|.*\n)+)"
    for match in re.finditer(form, text, re.M):
        lines = match[2].splitlines()
        found.append((match[1], cells(lines[0]), [cells(line) for line in lines[2:]]))
    return found


def records(path):
    """The operating points, or the named rows, of a results file."""
    content = json.loads(path.read_text())
    if "rows" in content:
        return [{"name": name, **row} for name, row in content["rows"].items()]
    curves = content.get("curves", [content])
    return [{"name": curve["name"], **{key: column[i] for block in ("results", "meta")
                                       for key, column in curve.get(block, {}).items()
                                       if isinstance(column, list) and i < len(column)}}
            for curve in curves for i in range(len(curve["results"]["bpp"]))]


def same(cell, value):
    """Whether a cell shows the value, rounded to the decimals of the cell."""
    match = NUMBER.fullmatch(cell)
    if value is None or not match:
        return value is None and cell in ("", "-")
    decimals = len(match[1].partition(".")[2])
    return f"{value / (1e6 if match[2] else 1):,.{decimals}f}" == match[1].removeprefix("+")


def fits(head, row, record):
    """Whether a row shows the record in all columns that the record has; two at least."""
    compared, seen = 0, set()
    for column, cell in zip(head, row, strict=True):
        keys = [key for key in KEYS.get(column, []) if key in record and column not in seen]
        seen.add(column)  # a second one of this name is the source's
        if column in ("widths", "N, M") and "N" in record:
            if cell != f"{record['N']}, {record['M']}":
                return False
        elif keys and cell:
            compared += 1
            if not same(cell, record[keys[0]]):
                return False
    return compared >= 2


def has_numbers(head):
    return bool({"bpp", "test bpp"} & set(head))


@pytest.mark.parametrize("paper", papers())
def test_tables_of_a_paper(paper):
    results = ROOT / paper / "results"
    published = records(results / "published.json")
    for name, head, rows in tables((ROOT / paper / "README.md").read_text()):
        if name is None and not has_numbers(head):
            continue
        assert name or (paper, head[0]) in UNMARKED, f"no file stands behind the table {head}"
        name = name or UNMARKED[paper, head[0]]
        if name is None:
            continue
        known = [r for n in name.split(", ") for r in records(results / f"{n}.json")]
        shown = []
        for row in rows:
            theirs = row[0].startswith("the seminar report's")
            named = [r for r in known if r["name"] == row[0]]
            matching = [r for r in (published if theirs else named or known) if fits(head, row, r)]
            assert matching, f"{paper}/README.md: {row} is not in the results of {name}"
            shown += matching
        assert [r for r in known if r not in shown] == [], f"the table {name} lacks these"


def test_front_page():
    """Each row is a point of results/small.json, or of quick.json, and all of small.json appear."""
    (_, head, rows), = [t for t in tables((ROOT / "RESULTS.md").read_text()) if has_numbers(t[1])]
    shown = []
    for row in rows:
        paper, = re.match(r"(\w+)", row[0]).groups()
        name = "quick" if row[0].endswith(", quick") else "small"
        matching = [r for r in records(ROOT / paper / "results" / f"{name}.json")
                    if fits(head, row, r)]
        assert matching, f"RESULTS.md: {row} is not in {paper}/results/{name}.json"
        shown += [(paper, r["bpp"]) for r in matching if name == "small"]
    assert {paper for paper, _ in shown} == set(papers())


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/results/*.json")),
                         ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_files_name_their_source(path):
    """Results without a row per image say where they are from, and how they are made anew."""
    content = json.loads(path.read_text())
    text = json.dumps(content)
    if "curves" in content:
        assert content.get("source") or all(
            curve["meta"].get("source") for curve in content["curves"])
    elif "per_image" not in content:
        assert any(word in text for word in ('"source"', "not kept", '"seed"', '"random_seed"'))


@pytest.mark.parametrize("path", [*(ROOT / name for name in (
    "README.md", "RESULTS.md", "common/README.md")), *(ROOT / p / "README.md" for p in papers()),
                                  *(path for p in papers() for path in (ROOT / p).glob("*.yaml"))],
                         ids=lambda path: "-".join(path.parts[-2:]))
def test_lines_of_prose_are_wrapped(path):
    """Paragraphs of a page, without tables, figures and code; comments at the start of a line."""
    if path.suffix == ".md":
        text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
        lines = [line for line in text.splitlines() if not line.startswith(("|", " "))]
    else:
        lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert [line for line in lines if len(line) > 100] == []


def test_a_wrong_number_is_found():
    page = ("x\n\n<!-- results: a -->\n\n| model | steps | bpp | PSNR |\n|---|---:|---:|---:|\n"
            "| small | 7,000 | 0.2954 | 27.90 |\n\n<!-- end of results -->\n")
    (name, head, (row,)), = tables(page)
    assert name == "a" and table_of(page, "a").startswith("| model |")
    right = {"bpp": 0.29541, "psnr-rgb": 27.9, "steps": 7000}
    assert fits(head, row, right)
    for wrong in ({"bpp": 0.2955}, {"psnr-rgb": 27.91}, {"steps": 7001}, {"steps": None}):
        assert not fits(head, row, right | wrong)
    assert not fits(head, row, {"bpp": 0.29541})  # too little to compare
