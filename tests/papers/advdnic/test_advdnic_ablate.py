"""advDNIC: the command that trains the ten experiments at equal steps and writes their table."""

import json

from common import UserError, data
from common.evaluation import image_sets
from common.recipes.tables import table_of

import pytest
import yaml
from advdnic_cases import ROOT
from PIL import Image

from advdnic import ablate, train
from advdnic.model import EXPERIMENTS

PAGE = "before\n\n<!-- results: ten -->\n| outdated |\n\n<!-- end of results -->\n\nafter\n"
TINY = ["--patchsize", "64", "--batchsize", "2", "--epochs", "1", "--steps-per-epoch", "2",
        "--eval-patchsize", "64", "--num_filters", "8"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of its own in place of advdnic/, with two test images."""
    (tmp_path / "test").mkdir()
    for i in range(2):
        Image.open(data.KODAK / "kodim23.png").crop((200, 100 + 50 * i, 330, 200 + 50 * i)).save(
            tmp_path / "test" / f"{i}.png")
    (tmp_path / "README.md").write_text(PAGE)
    monkeypatch.setattr(ablate, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(images, *words):
    ablate.main(["--config", str(ROOT / "advdnic" / "ten.yaml"), "--dataset", str(images),
                 "--images", "test", "--threads", "1", *words, "--", *TINY])


def test_trains_codes_and_continues(home, images, monkeypatch):
    run(images, "--experiments", "base", "mod1", "--output", "two.json")
    rows = json.loads((home / "two.json").read_text())["rows"]
    assert list(rows) == ["base", "mod1"]
    folder = home / "experiments" / "ten-mod1"
    coded = json.loads((folder / "coded.json").read_text())
    assert all(row["steps"] == row["batchsize"] == 2 for row in rows.values())
    assert rows["mod1"]["bpp"] == pytest.approx(coded["results"]["bpp"][0])
    costs = [image["bpp"] + 0.0035 * 255**2 * 10 ** (-image["psnr-rgb"] / 10)
             for image in coded["per_image"][0]]
    assert rows["mod1"]["loss"] == pytest.approx(sum(costs) / 2, rel=1e-6)
    # again: nothing is trained, and no image is coded
    monkeypatch.setattr(ablate, "evaluate", None)
    before = (folder / "epoch_0.pth").read_bytes()
    run(images, "--experiments", "base", "mod1", "--output", "again.json")
    assert (home / "again.json").read_text() == (home / "two.json").read_text()
    assert (folder / "epoch_0.pth").read_bytes() == before


def test_other_images_of_the_same_names_are_coded_again(home, images):
    run(images, "--experiments", "base", "--output", "one.json")
    first = json.loads((home / "one.json").read_text())
    Image.new("RGB", (130, 100), "grey").save(home / "test" / "0.png")
    run(images, "--experiments", "base", "--output", "one.json")
    second = json.loads((home / "one.json").read_text())
    assert second["images_digest"] != first["images_digest"]
    assert second["rows"]["base"]["psnr-rgb"] != first["rows"]["base"]["psnr-rgb"]


def test_other_weights_are_coded_again(home, images):
    run(images, "--experiments", "base")
    path = home / "experiments" / "ten-base" / "coded.json"
    found = json.loads(path.read_text())
    found["meta"]["fingerprint"], found["results"]["bpp"] = ["0" * 16], [9.0]
    path.write_text(json.dumps(found))
    run(images, "--experiments", "base", "--output", "one.json")
    assert json.loads((home / "one.json").read_text())["rows"]["base"]["bpp"] < 9


def test_publishes_all_or_nothing(home, images, monkeypatch):
    with pytest.raises(UserError, match="leave out --experiments"):
        run(images, "--experiments", "base", "--publish")
    for words, reason in ((["--images", "test"], "leave out --images"),
                          (["--config", "small.yaml"], "leave out --config"),
                          (["--", "--epochs", "1"], "the flags after --")):
        with pytest.raises(UserError, match=reason):
            ablate.main(["--publish", *words])
    (home / "results").mkdir()
    row = {"parameters": 1144131, "gmacs_encoder": 4.51, "gmacs_decoder": 4.41, "steps": 2,
           "bpp": 0.3349, "psnr-rgb": 26.35, "loss": 0.9654, "training_loss": 1.3291}
    monkeypatch.setattr(train, "main", lambda words: None)
    monkeypatch.setattr(ablate, "result", lambda folder, *_: row | {
        "loss": 1.9308} if folder.name == "ten-mod2" else row)
    ablate.main(["--publish"])
    page = (home / "README.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "outdated" not in page
    written = json.loads((home / "results" / "ten.json").read_text())
    rows = written["rows"]
    assert written["images_digest"] == image_sets.KNOWN["Kodak"] and written["flags"] == []
    assert list(rows) == list(EXPERIMENTS)
    assert table_of(page, "ten") == ablate.table(rows)
    assert ("| `mod2` | 1.14 M | 4.51 | 4.41 | 2 | 0.3349 | 26.35 | 1.931 | +100.0 % | 1.329 |"
            in page)


def test_equal_steps_and_batches_for_batch_norm():
    config = yaml.safe_load((ROOT / "advdnic" / "ten.yaml").read_text())
    assert config["batchsize"] >= 8 and "steps" not in config
