"""Facts of the repository as a whole: bundled images, pinned packages, who imports whom."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from common import install, installed
from common.papers import papers

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
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
PINS = ("requirements.txt", "requirements-nodeps.txt", "requirements-dev.txt",
        "requirements-demo.txt", "requirements-notebooks.txt")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml", "pytorch_msssim": "pytorch-msssim"}


def pins(*files):
    """The Requirement on each line of these files."""
    lines = (line.partition("#")[0].strip() for name in files for line in (ROOT / name).open())
    return [*map(Requirement, filter(None, lines))]


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
@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_exact_and_within_the_ranges(python):
    """Each Python gets exactly one version of each package."""
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + extras["dev"] + extras["demo"] + extras["notebooks"]
    here = {"python_version": python}
    pinned = [r for r in pins(*PINS) if r.marker is None or r.marker.evaluate(here)]
    by_name = {r.name: r for r in pinned}
    assert len(by_name) == len(pinned), "a package is pinned twice"
    for requirement in pinned:
        assert [s.operator for s in requirement.specifier] == ["=="], requirement
        assert requirement.url is None, requirement
    for text in declared + PROJECT["build-system"]["requires"]:
        requirement = Requirement(text)
        (pin,) = by_name[requirement.name].specifier
        assert requirement.specifier.contains(pin.version), f"{requirement}: pinned {pin}"


def test_supported_pythons_are_the_same_everywhere():
    named = {f"Programming Language :: Python :: {python}" for python in PYTHONS}
    assert named == {c for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d", c)}
    specifier = SpecifierSet(PROJECT["project"]["requires-python"])
    assert [f"3.{minor}" for minor in range(30) if f"3.{minor}" in specifier] == [*PYTHONS]
    assert [".".join(map(str, end)) for end in install.SUPPORTED] == [PYTHONS[0], PYTHONS[-1]]
    assert "(3, 10) <= sys.version_info < (3, 15)" in (ROOT / "Makefile").read_text()
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == [*PYTHONS]


def test_what_is_said_to_be_missing_is_what_is_declared():
    assert [installed.COMPRESSAI] == [str(r) for r in pins("requirements-nodeps.txt")]
    declared = {r.name: r for r in map(Requirement, PROJECT["project"]["dependencies"])}
    names = {installed.DISTRIBUTION.get(name, name).replace("_", "-") for name in installed.NEEDED}
    assert names == set(declared) - {"torchvision"}  # which nothing here imports
    oldest = ".".join(map(str, installed.OLDEST_TORCH))
    assert f">={oldest}" in str(declared["torch"].specifier)


def test_imported_packages_are_declared():
    declared = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    known = set(sys.stdlib_module_names) | {"common", *PAPERS}
    demo = {Requirement(text).name for text in PROJECT["project"]["optional-dependencies"]["demo"]}
    for path in SOURCES:
        page = demo if path == ROOT / "common/demo/page.py" else set()
        for name in set(imports(path)) - known - page:
            assert DISTRIBUTION.get(name, name) in declared, f"{path.relative_to(ROOT)}: {name}"


def test_packages_are_installed_by_setup():
    rule = PROJECT["tool"]["setuptools"]["packages"]["find"]
    assert rule["namespaces"] is False
    found = set(find_packages(str(ROOT), exclude=rule["exclude"]))
    assert {name.split(".")[0] for name in found} == {"common", *PAPERS}
    assert {"common.training", "common.coding", "common.evaluation", "common.recipes"} <= found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the files under version control, and their names."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files, folder = listed.stdout.splitlines(), tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools leaves a folder `build` beside what it builds
    for name in files:
        if not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    (source / "hyperprior/logs").mkdir()
    (source / "hyperprior/logs/run.yaml").write_text("a: 1")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index",
                    "--no-build-isolation", "--disable-pip-version-check", "-w", folder, source],
                   check=True, capture_output=True, text=True)
    (path,) = folder.glob("licodecs-*.whl")
    return path, files


def test_a_wheel_holds_what_coding_needs(wheel):
    """Code, weights, recipes and results are inside; images, tests and logs are not."""
    path, files = wheel
    with zipfile.ZipFile(path) as content:
        inside = {name for name in content.namelist() if ".dist-info/" not in name}
        (metadata,) = [name for name in content.namelist() if name.endswith("/METADATA")]
        described = content.read(metadata).decode()
        entries = content.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert inside == {name for name in files
                      if name.split("/")[0] in {"licodecs.py", "common", *PAPERS}
                      and name.endswith((".py", ".yaml", ".pth", ".json", ".html", ".css", ".js"))}
    for paper in PAPERS:
        assert {f"{paper}/results/published.json", f"{paper}/quick.yaml"} <= inside
        assert any(name.startswith(f"{paper}/weights/small-") for name in inside)
    assert "licodecs = licodecs:main" in entries
    for field in ("Author: ", "License-Expression: MIT", "Requires-Python: ", "Keywords: ",
                  "Description-Content-Type: text/markdown"):
        assert f"\n{field}" in described, field


def test_a_wheel_works_where_there_is_no_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel[0]) as content:
        content.extractall(tmp_path / "site")
    environment = {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    shutil.copy(KODAK / "kodim23.png", tmp_path)
    for words, status, said in (
            (("encode", "kodim23.png", "-o", "a.bin", "--paper", "factorized"), 0, "a.bin: "),
            (("decode", "a.bin"), 0, "decoded from a.bin"),
            (("eval", "--paper", "factorized"), 2, "error: the Kodak images and the")):
        done = subprocess.run([sys.executable, "-c", "import licodecs; licodecs.main()", *words],
                              cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert said in done.stdout + done.stderr
        assert done.stderr.count("\n") == (status != 0), done.stderr


# -------------------------------------------------------------------------------------- types
def test_types_of_common_and_of_the_models():
    """As in `make lint`; it covers every paper, and its exceptions are few and explained."""
    checked = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True,
                             text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    files = PROJECT["tool"]["mypy"]["files"]
    found = {path for pattern in files for path in ROOT.glob(pattern)}
    assert found == {ROOT / "common", ROOT / "licodecs.py",
                     *(ROOT / paper / "model.py" for paper in PAPERS)}
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
