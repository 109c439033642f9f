"""Only the parts of CompressAI and timm that are used are loaded, and all of them can be."""

import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from common import lazy_packages
from common.papers import papers

import forks
import pytest

ROOT = Path(__file__).parents[1]
PAPERS = papers()
SCRIPTS = [path for name in ("codec", "eval", "train", "bench")
           for path in sorted(ROOT.glob(f"*/{name}.py")) if path.parent.name in PAPERS]
HEAVY = ("torch_geometric", "pandas", "torchvision", "torch._dynamo", "matplotlib", "bjontegaard",
         "tensorboard", "scipy.stats._stats_py", "scipy.interpolate", "compressai.datasets",
         "compressai.losses", "compressai.transforms", "timm.models")
# Packages that CompressAI and timm require, and the papers do not use.
UNUSED = ("torch_geometric", "pandas", "torchvision", "huggingface_hub", "safetensors", "aiohttp",
          "requests", "psutil", "xxhash")
SHORT = ("--epoch 1 --steps-per-epoch 2 --batch_size 2 --patch-size 64 --N 4 --M 6 --num_workers 0 "
         "--precision fp32 --no-compile --optimizer muon").split()


@pytest.fixture(scope="module")
def loaded():
    """script -> what a process has loaded of HEAVY when it has imported all scripts up to it."""
    code = f"""
import importlib, json, sys
import common
loaded = {{}}
for name in {[f"{path.parent.name}.{path.stem}" for path in SCRIPTS]}:
    importlib.import_module(name)
    loaded[name] = [heavy for heavy in {HEAVY} if heavy in sys.modules]
print(json.dumps(loaded))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def test_no_heavy_module_is_loaded(loaded):
    """A bench.py may compare with a network of timm, which loads all of timm and torchvision."""
    for script in ("codec", "eval", "train"):
        found = {paper: loaded[f"{paper}.{script}"] for paper in PAPERS}
        assert not any(found.values()), (script, found)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    from common import data

    folder = tmp_path_factory.mktemp("images")
    x = data.read_image(data.KODAK / "kodim23.png")[:, 100:196, 200:296]
    for name in ("a", "b"):
        data.write_image(x, folder / f"{name}.png")
    return folder / "a.png"


def without(packages, *statements):
    """Code for a process that cannot import `packages`."""
    return "\n".join([
        "import sys",
        f"assert not sys.modules.keys() & {set(packages)}",
        f"sys.modules.update(dict.fromkeys({packages}))", "import common", *statements])


@pytest.mark.parametrize("paper", PAPERS)
def test_files_are_coded_without_the_unused_packages(paper, image, tmp_path):
    if not list((ROOT / paper / "weights").glob("*.pth")):
        pytest.skip("no bundled weights")
    calls = (["encode", str(image), "-o", "x.bin"], ["decode", "x.bin", "-o", "x.png"])
    code = without(UNUSED, f"from {paper} import codec", *(f"codec.main({c})" for c in calls))
    forks.run("-c", code, cwd=tmp_path)
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("paper", ["hyperprior", "joint_ar"])
def test_a_network_is_trained_without_the_unused_packages(paper, image, tmp_path):
    words = [*SHORT, "--dataset", str(image.parent), "--test_dataset", str(image.parent)]
    forks.run("-c", without(UNUSED, f"from {paper} import train", f"train.main({words})"),
              cwd=tmp_path)
    assert list(tmp_path.rglob("epoch_0.pth"))


def test_a_part_that_needs_a_missing_package_says_so(tmp_path):
    code = without(UNUSED, "import compressai", """
for name in ("datasets", "transforms"):
    try:
        getattr(compressai, name)
    except ImportError as error:
        print(name, error.name.partition(".")[0])
""")
    output, _ = forks.run("-c", code, cwd=tmp_path)
    missing = dict(line.split() for line in output.splitlines())
    assert missing.keys() == {"datasets", "transforms"}
    assert set(missing.values()) <= set(UNUSED)


@pytest.mark.parametrize("name", lazy_packages.PACKAGES)
def test_names_are_those_of_the_package_itself(name):
    """Run its __init__.py as it is: each name that this binds is the same object in the package."""
    if name.startswith("compressai"):
        for needed in ("torch_geometric", "pandas", "torchvision"):
            if find_spec(needed) is None:
                pytest.skip(f"all of CompressAI needs {needed}")
    package = importlib.import_module(name)
    assert type(package).__name__ == "_LazyPackage"
    eager = {"__name__": name, "__package__": name, "__path__": package.__path__}
    exec(compile(Path(package.__file__).read_text(), package.__file__, "exec"), eager)
    names = {key for key, value in eager.items() if not key.startswith("__")
             and getattr(value, "__module__", None) != name and key[0] != "_"}
    assert len(names) >= 4
    for key in names:
        assert getattr(package, key) is eager[key], key
    assert names <= set(dir(package))
    star = {}
    exec(f"from {name} import *", star)
    assert star.keys() >= set(eager.get("__all__", names))
    assert all(star[key] is eager[key] for key in names & star.keys())


def test_an_unknown_name_is_an_attribute_error():
    import compressai

    with pytest.raises(AttributeError, match="module 'compressai' has no attribute 'no_such'"):
        compressai.no_such  # noqa: B018
    assert not hasattr(compressai, "no_such")
