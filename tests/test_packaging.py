"""Facts of the repository as a whole: bundled images, pinned packages, who imports whom."""

import ast
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

from common.papers import papers

import pytest
from packaging.requirements import Requirement
from PIL import Image
from setuptools import find_packages

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
KODAK = ROOT / "common/images/kodak"
TRAIN = ROOT / "common/images/train"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAPERS = papers()
SOURCES = sorted(p for name in ("common", *PAPERS) for p in (ROOT / name).rglob("*.py"))
DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml", "pytorch_msssim": "pytorch-msssim"}


def pins():
    """The Requirement on each line of requirements.txt, by name."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").open())
    return {r.name: r for r in map(Requirement, filter(None, lines))}


def imports(path, everywhere=True):
    """Names of the top-level packages that a file imports, in order; relative imports left out."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def repository_files():
    """Text files that are, or are about to be, under version control."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if data and b"\0" not in data:
            yield name, data.decode()


# ----------------------------------------------------------------------------- bundled images
def test_kodak_is_the_published_set():
    files = sorted(KODAK.glob("*.png"))
    assert [f.name for f in files] == [f"kodim{i:02d}.png" for i in range(1, 25)]
    listed = dict(line.split()[::-1] for line in (KODAK / "SHA256SUMS").open())
    assert {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files} == listed
    together = hashlib.sha1(b"".join(f.read_bytes() for f in files)).hexdigest()
    assert together == "076e2a5fd4515b5fda677f15fe63dd112d266bc5"  # as others check r0k.us's copy


def test_training_tiles_are_small_and_readable():
    files = sorted(TRAIN.glob("*.jpg"))
    assert 55 <= len(files) <= 70
    assert sum(f.stat().st_size for f in files) < 6_500_000
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert image.mode == "RGB" and min(image.size) >= 256, file.name
            assert all(side % 16 == 0 for side in image.size), file.name


def test_each_training_tile_has_its_licence():
    line = re.compile(r"^(\S+\.jpg) +(\d+)x(\d+) +\d+  \S+$", re.MULTILINE)
    entries = line.findall((TRAIN / "LICENSES").read_text())
    assert [name for name, *_ in entries] == sorted(f.name for f in TRAIN.glob("*.jpg"))
    for name, width, height in entries:
        with Image.open(TRAIN / name) as image:
            assert image.size == (int(width), int(height)), name


# ----------------------------------------------------------------------------------- packages
def test_pins_are_exact_and_within_the_ranges():
    project = PROJECT["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["dev"]
    pinned = pins()
    for requirement in pinned.values():
        assert [s.operator for s in requirement.specifier] == ["=="], requirement
        assert requirement.url is None, requirement
    for text in declared + PROJECT["build-system"]["requires"]:
        requirement = Requirement(text)
        (pin,) = pinned[requirement.name].specifier
        assert requirement.specifier.contains(pin.version), f"{requirement}: pinned {pin}"


def test_imported_packages_are_declared():
    declared = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    known = set(sys.stdlib_module_names) | {"common", *PAPERS}
    for path in SOURCES:
        for name in set(imports(path)) - known:
            assert DISTRIBUTION.get(name, name) in declared, f"{path.relative_to(ROOT)}: {name}"


def test_packages_are_installed_by_setup():
    rule = PROJECT["tool"]["setuptools"]["packages"]["find"]
    assert rule["namespaces"] is False
    found = set(find_packages(str(ROOT), exclude=rule["exclude"]))
    assert {name.split(".")[0] for name in found} == {"common", *PAPERS}
    assert {"common.training", "common.coding", "common.evaluation", "common.recipes"} <= found


# -------------------------------------------------------------------------------------- types
def test_types_of_common_and_of_the_models():
    """As in `make lint`; it covers every paper, and its exceptions are few and explained."""
    checked = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True,
                             text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    files = PROJECT["tool"]["mypy"]["files"]
    found = {path for pattern in files for path in ROOT.glob(pattern)}
    assert found == {ROOT / "common", *(ROOT / paper / "model.py" for paper in PAPERS)}
    ignored = [line for path in SOURCES for line in path.read_text().splitlines()
               if "# type: ignore" in line]
    assert len(ignored) <= 15
    for line in ignored:
        assert re.search(r"# type: ignore\[[a-z-]+\]  # \w", line), line


def test_a_new_folder_can_be_imported_at_once(tmp_path):
    """`make setup` puts the repository itself on the path, not a list of its packages."""
    if ROOT / ".venv" not in Path(sys.executable).parents:
        pytest.skip("not run in the environment of make setup")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", "import sys; print(*sys.path, sep='\\n')"],
                          cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert str(ROOT) in done.stdout.splitlines()


# ------------------------------------------------------------------------------------ imports
def test_a_paper_imports_no_other_paper():
    assert PAPERS, "no paper folder found"
    for path in SOURCES:
        own = path.relative_to(ROOT).parts[0]
        foreign = set(imports(path)) & (set(PAPERS) - {own})
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_common_knows_no_paper():
    """No branch on a paper's name; the words may appear in prose."""
    for path in (ROOT / "common").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        strings = {node.value for node in nodes if isinstance(node, ast.Constant)}
        assert not strings & set(PAPERS), path.name


def test_common_is_imported_before_torchvision():
    needs = {"torchvision", "compressai", "timm"}
    for path in SOURCES:
        order = list(imports(path, everywhere=False))
        first = min((order.index(name) for name in needs & set(order)), default=None)
        if first is not None and path.parent.name != "common":  # there, common/__init__.py ran
            assert "common" in order[:first], path.relative_to(ROOT)


def test_scripts_import_common_before_their_paper():
    """common.py of the folder then makes both come from the same clone, see common/clone.py."""
    scripts = [p for p in SOURCES if p.parent.name in PAPERS and "__main__" in p.read_text()]
    assert len(scripts) >= 4 * len(PAPERS)
    for path in scripts:
        order = [name for name in imports(path, everywhere=False) if name in {"common", *PAPERS}]
        assert order[0] == "common", path.relative_to(ROOT)


def test_torchvision_imports_after_common():
    """In a fresh process: the operators are declared where the real ones cannot be loaded."""
    code = ("import common, torchvision, torch; torch.ops.torchvision.nms;"
            "assert torchvision.extension._has_ops() == (not common._declarations)")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_path_of_one_machine():
    folders = "|".join(("work", "home", "root", "Users", "tmp"))
    pattern = re.compile(rf"(?<![\w.~$}})/-])/({folders})/\w")
    for name, text in repository_files():
        for number, line in enumerate(text.splitlines(), 1):
            assert not pattern.search(line), f"{name}:{number}: {line.strip()[:80]}"
