"""Curves are compared only if they are of the same images; how `make reproduce-<paper>` ends."""

import argparse
import importlib
import json
import math

from common import UserError, data
from common.evaluation import classical, compare, image_sets, reproduction
from common.evaluation.curve_values import cost
from common.evaluation.results import (
    image_record,
    load_published,
    load_results,
    merge_points,
    operating_point,
    save_results,
)
from common.papers import ROOT, papers

import pytest
import torch

KODAK = sorted(data.KODAK.glob("*.png"))


@pytest.fixture(scope="module")
def kodak():
    return [data.read_image(path) for path in KODAK]


@pytest.fixture(autouse=True)
def jpeg(kodak, monkeypatch):
    """In place of JPEG: the same two points for all images."""
    known = dict(zip(KODAK, kodak, strict=True))
    monkeypatch.setattr(classical, "jpeg", lambda paths, **_: measured(
        [known[p] if p in known else data.read_image(p) for p in paths], "JPEG"))


def measured(images, name="ours"):
    """Results at two rates on some images."""
    rows = [{"image": str(i), "digest": image_sets.image_digest(x), "bytes": 9}
            for i, x in enumerate(images)]
    return merge_points([operating_point(
        name, "", [row | {"bpp": rate, "psnr-rgb": psnr} for row in rows], {"lmbda": rate})
        for rate, psnr in ((0.2, 27.0), (0.4, 29.0))])


# ----------------------------------------------------------------------------------- image sets
def test_kodak_is_known_by_its_pixels(kodak, tmp_path):
    """In any order, as other files and under other names; neither a part nor with one other pixel.
    """
    data.write_image(kodak[3], tmp_path / "other.bmp")
    again = [data.read_image(tmp_path / "other.bmp"), *kodak[4:], *kodak[:3]]
    digests = [image_sets.image_digest(x) for x in again]
    known = image_sets.KNOWN["Kodak"]
    assert image_sets.set_digest(digests) == known
    assert image_sets.title(known) == "Kodak, 24 images"
    assert image_sets.set_digest(digests[:3]) != known
    again[0][0, 0, 0] ^= 1
    assert image_sets.set_digest([image_sets.image_digest(x) for x in again]) != known
    turned = kodak[0].transpose(1, 2).contiguous()  # the same bytes in another shape
    assert image_sets.image_digest(kodak[0].reshape(turned.shape)) != digests[21]


def test_results_state_their_images(kodak):
    """Also those of a part, and merged points; points of several sets state none."""
    two, one = measured(kodak[:2]), measured(kodak[:1])
    row = image_record("0", kodak[0], kodak[1], 9, ms_ssim=False)
    assert row["digest"] == one["per_image"][0][0]["digest"] == image_sets.image_digest(kodak[0])
    digest = image_sets.set_digest([image_sets.image_digest(x) for x in kodak[1::-1]])
    assert two["meta"]["images_digest"] == [digest, digest] and image_sets.digest_of(two) == digest
    assert image_sets.title(image_sets.digest_of(one)) == "1 image"
    one["meta"]["images_digest"][0] = digest
    assert image_sets.digest_of(one) is None


@pytest.mark.parametrize("paper", papers())
def test_bundled_and_published_results_are_of_kodak(paper):
    folder = ROOT / paper / "results"
    for path in folder.glob("*.json"):
        if path.name == "published.json":
            curves = load_published(path)
        else:  # tables of variants have rows of their own
            curves = [load_results(path)] if "results" in json.loads(path.read_text()) else []
        for curve in curves:
            assert image_sets.title(image_sets.digest_of(curve)) == "Kodak, 24 images", path


def test_published_curves_stand_beside_the_same_images_only(kodak, tmp_path, capsys):
    """By eval.py's report and by compare: whole set, three images, unknown images, no such set."""
    published = ROOT / "hyperprior" / "results" / "published.json"

    def report(images, paths):
        compare.report([measured(images)], published, paths, tmp_path, "X")
        return capsys.readouterr().out

    whole = report(kodak, KODAK)
    assert "BD-rate of ours against bmshj2018" in whole and "left out" not in whole
    assert "dB above ref." in whole
    part = report(kodak[:3], KODAK[:3])
    assert "CompressAI" not in part and "BD-rate" not in part
    assert "dB above JPEG" in part and "dB above ref." not in part  # JPEG is not named twice
    note = ("Published curves are left out: they were measured on Kodak, 24 images, mean over "
            "images, but these results on 3 images.")
    assert part.count(note) == 1
    for path in KODAK[:3]:
        data.write_image(data.read_image(path), tmp_path / "three" / path.name)
    flags = ["--published", str(published), "--results", str(tmp_path / "X-ours.json")]
    compare.main([*flags, "--dataset", str(tmp_path / "three"), "--plot", str(tmp_path / "a.png")])
    assert note in (out := capsys.readouterr().out) and "CompressAI" not in out
    with pytest.raises(UserError, match="ours: was measured on 3 images, not on .*--dataset"):
        compare.main(flags)  # JPEG would be that of Kodak


def test_other_published_sets(kodak, tmp_path):
    """A published.json may state the digest of its images itself."""
    ours, path = measured(kodak[:2]), tmp_path / "p.json"
    curve = {"name": "a", "results": {"bpp": [0.1, 0.9], "psnr-rgb": [26.0, 33.0]}}

    def others(**content):
        save_results(path, content | {"reference": "a", "curves": [curve]})
        found = compare.others([ours], path, KODAK[:2])
        return [c["name"] for c in found.published], found.note

    digest = image_sets.digest_of(ours)
    assert others(dataset="two", images_digest=digest) == (["a"], "")
    names, note = others(dataset="two", images_digest="2 images 0")
    assert not names and "measured on two, but these results on 2 images with other pixels." in note
    names, note = others(dataset="CLIC, 41 images")
    assert not names and "(it states no images_digest), but these results on 2 images." in note


def test_results_that_do_not_state_their_images(kodak, tmp_path):
    """As written by other programs: no published curve, and a line that says why."""
    ours = measured(kodak[:2])
    del ours["meta"]["images_digest"]
    found = compare.others([ours], ROOT / "hyperprior" / "results" / "published.json", KODAK[:2])
    assert not found.published and "ours does not state its images" in found.note


# ------------------------------------------------------------------------ the end of reproduce
def record(psnr=28.0, **meta):
    meta = {"N": 48, "M": 64, "lmbda": 0.0035, "steps": 7000,
            "images_digest": image_sets.KNOWN["Kodak"]} | meta
    return {"name": "quick", "results": {"bpp": [0.3], "psnr-rgb": [psnr]},
            "meta": {key: [value] for key, value in meta.items()}, "expected": {"band": 0.04}}


def test_verdict():
    """By the cost bpp + lmbda * 255^2 * MSE; numbers of another run give none."""
    assert cost(0.3, 28.0, 0.0035) == pytest.approx(0.3 + 0.0035 * 255**2 * 10**-2.8)
    found = {}
    for psnr in (27.4, 27.8, 28.2, 28.6):  # costs +8.0, +2.6, -2.5, -7.0 %
        line, = reproduction.verdict(record(psnr), record(), "quick.yaml")
        found[psnr] = line.split(": ")[-1]
        share = 100 * (cost(0.3, psnr, 0.0035) / cost(0.3, 28.0, 0.0035) - 1)
        assert "0.3000 bpp, 28.00 dB; the cost" in line and f"is {share:+.1f} % from it" in line
    assert list(found.values()) == ["worse than expected", "as expected", "as expected",
                                    "better than expected"]
    for other, flag, words in (
            (record(steps=10), "", "another run, with steps 7000"),
            (record(N=64), "", "another run, with N 48"),
            (record(images_digest="2 images 0"), "", "those of Kodak, 24 images"),
            (record(), "--dataset X", "those of q without --dataset X")):
        line, = reproduction.verdict(other, record(), "q", flag)
        assert words in line and "as expected" not in line
    line, = reproduction.verdict(record(), None, "config.yaml")
    assert line == "there are no expected numbers on record for config.yaml"


@pytest.mark.parametrize("paper", papers())
def test_other_images_and_metrics_are_other_runs(paper):
    """--dataset, by whatever name the paper's configuration holds it."""
    flags = importlib.import_module(f"{paper}.train").flags()
    config = vars(flags.parse_args(["--dataset", "/x"]))
    assert reproduction.departure(ROOT / paper, config) == "--dataset /x"
    assert reproduction.departure(ROOT / paper, vars(flags.parse_args([]))) == ""
    assert reproduction.departure(ROOT / paper, {"metric": "ms-ssim"}) == "--metric ms-ssim"


def test_expected_numbers_belong_to_the_recipe():
    """results/quick.json has the lmbda and widths of a quick run; small.json has no band."""
    for paper in papers():
        quick = reproduction.expected(ROOT / paper, ROOT / paper / "quick.yaml")
        assert quick and 0 < quick["expected"]["band"] < 0.1 and quick["expected"]["why"]
        assert reproduction.expected(ROOT / paper, ROOT / paper / "small.yaml") is None


def test_the_end_of_reproduce(tmp_path, monkeypatch, capsys):
    """It names the weights, compares, and writes a picture; the commands that it prints work."""
    home = ROOT / "factorized"
    checkpoint = home / "weights" / "small-0.0035.pth"
    image = data.read_image(KODAK[22])[:, 100:196, 200:328]
    data.write_image(image, tmp_path / "photo.png")
    trained = measured([image], "quick")
    args = argparse.Namespace(config=home / "quick.yaml", resultdir=tmp_path / "results",
                              device="cpu", threads=1)
    monkeypatch.chdir(home)
    curves, files = [trained, measured([image], "small")], [tmp_path / "photo.png"]
    for rows in trained["per_image"]:
        rows[0]["image"] = "photo"
    reproduction.conclude(args, home, {"quick": [checkpoint], "small": []}, curves, files)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Trained with quick.yaml: factorized/weights/small-0.0035.pth"
    assert lines[2] == "  result: 0.2000 bpp, 27.00 dB (lmbda 0.2) on 1 image"
    assert lines[4].strip() == "the expected numbers are those of Kodak, 24 images"
    picture = data.read_image(tmp_path / "results" / "quick-photo.png")
    assert picture.shape == (3, 96, 128 + 8 + 128) and torch.equal(picture[..., :128], image)
    assert 20 < compare.metrics.psnr(picture[..., -128:].contiguous(), image) < math.inf
    assert str(tmp_path / "results" / "quick-photo.png") in lines[5]
    from factorized import codec

    for line, word in zip(lines[-2:], ("encode", "decode"), strict=True):
        command = line.split("codec.py ")[1].split()
        assert line.strip().startswith("cd factorized && ") and command[0] == word
        codec.main([str(tmp_path / name) if name.endswith((".png", ".bin")) else name
                    for name in command])
    assert torch.equal(data.read_image(tmp_path / "decoded.png"), picture[..., -128:])
    reproduction.conclude(args, home, {"other": [checkpoint]}, curves, files)  # --checkpoint
    assert "Trained" not in capsys.readouterr().out


@pytest.mark.parametrize("number, names", [(24, ["quick", "fixed"]), (2, ["quick"])])
def test_fixed_rate_models_of_qvrf_are_those_of_kodak(number, names, kodak, monkeypatch, capsys):
    """Their results are only read, so they stand beside those on the same images, too."""
    from qvrf import eval as qvrf_eval

    seen = []
    monkeypatch.setattr(qvrf_eval, "find_checkpoints", lambda args: {"quick": []})
    monkeypatch.setattr(qvrf_eval.evaluate, "curves_of",
                        lambda *_: [measured(kodak[:number], "quick")])
    monkeypatch.setattr(qvrf_eval.compare, "report", lambda curves, *_: seen.extend(curves))
    monkeypatch.setattr(qvrf_eval.reproduction, "conclude", lambda *_: None)
    qvrf_eval.main(["--reproduce", "--config", "quick.yaml", "--device", "cpu"])
    assert [curve["name"] for curve in seen] == names
    out = capsys.readouterr().out
    assert ("fixed.json is left out: it was measured on Kodak, 24 images" in out) == (number == 2)
    assert ("BD-rate of quick" in out) == (number == 24)
