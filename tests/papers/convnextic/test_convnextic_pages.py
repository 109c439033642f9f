"""ConvNeXTIC: published and bundled results, the ablation, the commands of the README."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

from common import UserError, data
from common.coding.model_file import load_checkpoint
from common.evaluation import image_sets

import pytest
from convnextic_cases import ROOT, TINY
from PIL import Image

from convnextic import ablate, train


# --------------------------------------------------------------------------------------- published
def test_published_results():
    published = json.loads((ROOT / "convnextic" / "results" / "published.json").read_text())
    points = [point for c in published["curves"]
              for point in zip(c["results"]["bpp"], c["results"]["psnr-rgb"], strict=True)]
    for point in ((0.248, 30.26), (1.171, 39.16), (0.319, 32.34), (0.128, 29.16), (1.694, 40.68)):
        assert point in points


@pytest.mark.parametrize("quality, costs", [
    ("3", {"baseline": 0.927, "AdamW": 0.940, "d3393": 0.919, "dwtrans": 0.932, "GDN": 0.965,
           "drop path": 0.941}),
    ("7", {"baseline": 5.043, "AdamW": 4.957, "d3393": 5.034, "dwtrans": 5.066, "GDN": 5.269,
           "drop path": 5.070})])
def test_published_ablation(quality, costs):
    """J of each row, as the specification has computed it."""
    lmbda = train.LMBDAS[int(quality) - 1]
    for row, expected in costs.items():
        found = ablate.cost(*ablate.PUBLISHED[quality][row], lmbda)
        assert found == pytest.approx(expected, abs=0.001 if quality == "3" else 0.002)


# --------------------------------------------------------------------------------------- pages
def test_bundled_rates():
    """One model spans a factor of four in rate, and every image's rate follows lmbda."""
    found = json.loads((ROOT / "convnextic" / "results" / "small.json").read_text())
    assert found["meta"]["lmbda"] == sorted(found["meta"]["lmbda"])
    assert found["results"]["bpp"][-1] > 4 * found["results"]["bpp"][0]
    for image in zip(*found["per_image"], strict=True):
        rates = [row["bpp"] for row in image]
        assert all(a < b for a, b in zip(rates, rates[1:], strict=False)), image[0]["image"]
    surpluses = [surplus(row) for images in found["per_image"] for row in images]
    assert -0.025 < min(surpluses) and max(surpluses) < 0.01
    assert sum(abs(s) >= 0.01 for s in surpluses) <= 1  # of 144
    for images in found["per_image"]:
        assert abs(sum(map(surplus, images)) / len(images)) < 0.01


def surplus(row):
    """Of a file without its header over the estimate, which has 30 bits for each latent beyond a
    likelihood of 1e-9: in files they cost less.
    """
    payload = 8 * (row["bytes"] - 29) / (row["height"] * row["width"])
    return payload / row["bpp_estimated"] - 1


def test_pages_give_the_bundled_results():
    results = json.loads((ROOT / "convnextic" / "results" / "small.json").read_text())["results"]
    page, front = ((ROOT / name).read_text() for name in ("convnextic/README.md", "RESULTS.md"))
    for bpp, psnr in zip(results["bpp"], results["psnr-rgb"], strict=True):
        assert f"| {bpp:.4f} | {psnr:.2f} |" in page
    assert f"| {results['bpp'][2]:.4f} | {results['psnr-rgb'][2]:.2f} |" in front


def test_page_gives_the_ablation():
    rows = json.loads((ROOT / "convnextic" / "results" / "ablation.json").read_text())["rows"]
    assert list(rows) == list(ablate.ROWS)
    page = (ROOT / "convnextic" / "README.md").read_text()
    for row in ablate.table(rows).splitlines():
        assert row in page


def test_ablation_is_measured_on_kodak(tmp_path, monkeypatch):
    """Whatever the training is validated with; as validation would measure the same images."""
    kodak = Image.open(data.KODAK / "kodim23.png")
    for folder in ("set/train", "kodak"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            kodak.crop((90 * i, 100, 150 + 90 * i, 250)).save(tmp_path / folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate.data, "KODAK", tmp_path / "kodak")
    tiny = [*TINY, "--epochs", "1", "--latent_dim", "12", "--no-compile"]

    def ablated(name):
        ablate.main(["--rows", "baseline", "--dataset", "set", "--name", name, "--output",
                     "a.json", "--", *tiny])
        return json.loads(Path("a.json").read_text())

    written = ablated("a")
    assert written["flags"] == tiny and "128x128 crops of 3 Kodak" in written["description"]
    assert written["images_digest"] == image_sets.set_digest(
        [image_sets.image_digest(crop) for crop in ablate.kodak_crops(128)])
    assert written["rows"]["baseline"]["validation"] == "1 image held out of the training data"
    shutil.copytree("kodak", "set/test")
    row = ablated("b")["rows"]["baseline"]
    test = load_checkpoint("results/b-baseline/3/snapshots/latest.pt")["test"]
    assert row["validation"] == "3 images of test"
    assert [row["bpp"], row["psnr"]] == pytest.approx([test["bpp"], test["psnr"]], rel=1e-6)


@pytest.mark.parametrize("more", [["--config", "other.yaml"], ["--", "--epochs", "9"]])
def test_only_the_recipe_is_published(more):
    with pytest.raises(UserError, match="that of ablation.yaml"):
        ablate.main(["--publish", *more])


def test_readme_commands(tmp_path, monkeypatch):
    """In their order, in one folder, as a reader would type them; only sizes are made tiny."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "convnextic" / "README.md").read_text(), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("python ")]
    assert {c[0] for c in commands} == {"train.py", "ablate.py", "eval.py", "codec.py"}
    kodak = Image.open(data.KODAK / "kodim23.png")
    for folder in ("flicker/train", "flicker/test", "Kodak"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(2):
            kodak.crop((90 * i, 100, 128 + 90 * i, 230)).save(tmp_path / folder / f"{i}.png")
    kodak.crop((100, 100, 280, 165)).save(tmp_path / "test.png")
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, "--epochs", "1", "--latent_dim", "12", "--no-compile"]
    at = tiny.index("--quality_level")
    del tiny[at : at + 2]
    for script, *words in commands:
        words = [str(ROOT / "convnextic" / w) if w.endswith(".yaml") else w for w in words]
        if script == "train.py":
            words += tiny
        elif script == "ablate.py":
            words += ["--rows", "baseline", "stride 2 (v2)", "--", *tiny, "--trainset", "flicker"]
        elif script == "eval.py" and "--testset" not in words:
            words += ["--testset", "Kodak"]
        importlib.import_module(f"convnextic.{script.removesuffix('.py')}").main(words)
    assert Image.open("out.png").size == (180, 65)
    sizes = [Path(f"{name}.bin").stat().st_size for name in ("compressed", "rate", "patches")]
    assert sizes == sorted(sizes)
