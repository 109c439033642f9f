"""The weights.yaml of all papers, and the rows of results that are written into the READMEs."""

import importlib
import json
import shutil

from common import UserError, cli, data
from common.evaluation import classical
from common.evaluation.results import image_record, operating_point
from common.recipes import jobs, pages, report, stages, weights
from common.recipes.recipe_file import words

import pytest
import yaml
from recipes_cases import ROOT

PAPERS = sorted(path.parent.name for path in ROOT.glob("*/weights.yaml"))


# ---------------------------------------------------------------------------- the files of the tree
@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("short", [False, True])
def test_every_file_of_the_tree(paper, short, monkeypatch):
    """It is accepted, and so are all flags by train.py; configurations exist."""
    monkeypatch.chdir(ROOT / paper)
    settings = jobs.Settings(ROOT, "short" if short else "weights", "tiles.tar", "", 1, "cpu",
                             str(data.KODAK) if short else None, short)
    module = importlib.import_module(f"{paper}.train")
    for job in weights.Plan(settings, [paper]).jobs:
        if job.paper == paper and isinstance(job, stages.Stage):
            job.definition()
            flags = {key: job.fill(value, settings) for key, value in job.flags.items()}
            cli.parse(module.flags(), words(flags))


# ------------------------------------------------------------------------------------------- pages
def test_rows_of_the_pages():
    """Those of the curve are replaced in the columns of the table, others are kept."""
    results = {"results": {"bpp": [0.2, 0.4], "psnr-rgb": [28.0, 30.0],
                           "ms-ssim-rgb": [0.93, None]},
               "meta": {"N": [64, 64], "M": 192, "steps": [140_000, 100_000],
                        "lmbda": [0.0035, 0.013]}}
    reference = {"results": {"bpp": [0.1, 0.5], "psnr-rgb": [27.0, 33.0]}}
    jpeg = {"results": {"bpp": [0.3, 0.5], "psnr-rgb": [26.0, 29.0]}}
    points = pages.cells(results, reference, jpeg)
    page = ("text\n<!-- results: small -->\n\n| codec | bpp | PSNR | MS-SSIM | above JPEG | other |"
            "\n|---|---|\n| first, lmbda 1 | 1 |\n| small, lmbda 0.1 | 9 |\n| small-b, x | 2 |\n"
            "| small, lmbda 0.2 | 8 |\n| last | 3 |\n\n<!-- end of results -->\nmore\n")
    new, rows = pages.replace(page, "<!-- results: small -->", "small", ["small, a", "small, b"],
                              points)
    assert rows[0] == "| small, a | 0.2000 | 28.00 | 0.9300 | - | 29.58 |"
    assert rows[1].startswith("| small, b | 0.4000 | 30.00 | - | +2.")
    assert new.splitlines()[5:10] == ["| first, lmbda 1 | 1 |", *rows, "| small-b, x | 2 |",
                                      "| last | 3 |"]
    assert pages.replace(new, "<!-- results: small -->", "small", ["small, a", "small, b"],
                         points) == (new, rows)
    assert pages.replace("no table", "<!-- results -->", "x", ["x", "x"], points)[0] == "no table"
    both = page.replace("results: small -->", "results: small, small-b -->")
    assert pages.marker(page, "small") == "<!-- results: small -->" == pages.marker("", "small")
    assert pages.marker(both, "small-b") == "<!-- results: small, small-b -->"
    assert pages.replace(both, pages.marker(both, "small"), "small", ["small, a", "small, b"],
                         points) == (new.replace("small -->", "small, small-b -->"), rows)
    front = ("<!-- results -->\n\n| codec | steps | theirs |\n|---|\n| x (b), level 0 | 1 | 1 |\n"
             "| x2 | 2 | 2 |\n| x, quick | 3 | 3 |\n| x (b), quick | 4 | 4 |\n\n"
             "<!-- end of results -->\n")
    new, _ = pages.replace(front, "<!-- results -->", "x", ["x", "x"], points)
    assert new.splitlines()[4:9] == ["| x | 140,000 | 29.58 |", "| x | 100,000 | 32.17 |",
                                     "| x2 | 2 | 2 |", "| x, quick | 3 | 3 |",
                                     "| x (b), quick | 4 | 4 |"]


def test_publish_writes_what_the_pages_give(tmp_path, capsys, monkeypatch):
    """The bundled results of hyperprior: their own rows again; without a table they are printed."""
    results = json.loads((ROOT / "hyperprior" / "results" / "small.json").read_text())
    home = tmp_path / "hyperprior"
    (home / "results").mkdir(parents=True)
    shutil.copy(ROOT / "hyperprior" / "results" / "published.json", home / "results")
    shutil.copy(ROOT / "RESULTS.md", tmp_path)
    (home / "README.md").write_text("nothing\n")
    path = tmp_path / "Hyperprior-x.json"
    path.write_text(json.dumps(results | {"name": "x"}))
    jpeg = results | {"name": "JPEG", "results": {"bpp": [0.1, 1.9], "psnr-rgb": [20.0, 35.0]}}
    monkeypatch.setattr(classical, "jpeg", lambda paths, **flags: jpeg)
    pages.main(["hyperprior", "small", str(path)], tmp_path)
    out = capsys.readouterr().out
    assert "hyperprior/README.md has no table after <!-- results: small -->" in out
    front = (tmp_path / "RESULTS.md").read_text()
    for bpp, psnr in zip(*(results["results"][key] for key in ("bpp", "psnr-rgb")), strict=True):
        assert f"| {bpp:.4f} | {psnr:.2f} |" in out and f"| {bpp:.4f} | {psnr:.2f} |" in front
    assert front.count("\n| hyperprior |") == len(results["results"]["bpp"])
    assert "| hyperprior, quick |" in front
    assert json.loads((home / "results" / "small.json").read_text())["name"] == "small"
    assert (home / "results" / "small.png").exists()


@pytest.mark.parametrize("options", [{"label": "x, {nothing}"}, {"label": "{steps:q}"}])
def test_a_label_that_does_not_fit_is_one_line(options, tmp_path):
    """The curve's options in weights.yaml are named, and the pages stay as they were."""
    home = tmp_path / "hyperprior"
    home.mkdir()
    recipe = yaml.safe_load((ROOT / "hyperprior" / "weights.yaml").read_text())
    recipe["curves"]["small"] |= options
    (home / "weights.yaml").write_text(yaml.safe_dump(recipe))
    results = json.loads((ROOT / "hyperprior" / "results" / "small.json").read_text())
    with pytest.raises(UserError, match="curves: small: label does not fit"):
        pages.publish(tmp_path, "hyperprior", results, None, data.list_images(data.KODAK))


def test_other_images_do_not_reach_the_tables(tmp_path, capsys):
    """Neither by pages nor by report; in another folder the published curves are left out."""
    results = json.loads((ROOT / "hyperprior" / "results" / "small.json").read_text())
    image = [data.KODAK / "kodim23.png"]
    one = operating_point("small", "", [image_record("a", *2 * [data.read_image(image[0])], 9)], {})
    one["results"] |= {"psnr-rgb": [40.0]}
    for other in (one, results | {"meta": {}}):
        with pytest.raises(UserError, match="do not go to the tables of Kodak: .*--into"):
            pages.publish(ROOT, "hyperprior", other, None, image)
    with pytest.raises(UserError, match="results on 1 image do not go"):
        report.main(["hyperprior", "--dataset", str(image[0])])
    with pytest.raises(UserError, match="was measured on Kodak, 24 images, not on .*--dataset"):
        pages.publish(ROOT, "hyperprior", results, tmp_path, image)
    pages.publish(ROOT, "hyperprior", one, tmp_path, image)
    out = capsys.readouterr().out
    assert out.startswith("Published curves are left out") and out.count("\n") == 1
    assert (tmp_path / "small.png").exists()


def test_report_evaluates_the_bundled_weights(tmp_path, capfd):
    """By eval.py, on other images, into another folder: the pages are not touched."""
    image = data.read_image(data.KODAK / "kodim23.png")[:, 100:228, 200:328]
    data.write_image(image, tmp_path / "images" / "a.png")
    report.main(["factorized", "--dataset", str(tmp_path / "images"), "--into", str(tmp_path),
                 "--threads", "1"])
    results = json.loads((tmp_path / "small.json").read_text())
    assert results["name"] == "small" and (tmp_path / "small.png").exists()
    assert len(results["results"]["bpp"]) == len(list((ROOT / "factorized/weights").glob("*.pth")))
    assert "small.json and .png are written" in capfd.readouterr().out
