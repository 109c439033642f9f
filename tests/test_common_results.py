"""What an evaluation leaves behind: results beside the files, whatever happens, and their names."""

import json
from pathlib import Path

from common import UserError, data
from common.coding.contract import Provenance
from common.coding.model_file import coding_state, save_checkpoint
from common.evaluation import evaluate
from common.evaluation.results import load_results

import pytest
from helpers import factorized_model, locking_process, photo

from factorized import eval as factorized_eval
from factorized.model import build


@pytest.fixture(scope="module")
def model():
    return factorized_model()


@pytest.fixture
def paths(tmp_path):
    for name in "abc":
        photo(tmp_path / "images" / f"{name}.png", 40, 48)
    return data.list_images(tmp_path / "images")


def test_results_of_coded_images_outlive_an_error(model, paths, tmp_path, monkeypatch):
    out, original, calls = tmp_path / "out", evaluate.encode_images, []

    def encode(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # a warm-up, then a, b and c
            raise UserError("the disk is full")
        return original(*args, **kwargs)

    monkeypatch.setattr(evaluate, "encode_images", encode)
    with pytest.raises(UserError, match="the disk is full .the results of 2 of 3 images are in"):
        evaluate.evaluate(model, paths, "tiny", out_dir=out)
    kept = load_results(out / "results-incomplete.json")
    assert [row["image"] for row in kept["per_image"][0]] == ["a", "b"]
    assert kept["meta"]["images"] == [2] and not (out / "results.json").exists()
    whole = evaluate.evaluate(model, paths, "tiny", out_dir=out)
    assert load_results(out / "results.json")["results"]["bpp"] == [
        pytest.approx(whole["results"]["bpp"][0], abs=1e-6)]
    assert not (out / "results-incomplete.json").exists() and not (out / ".lock").exists()


def test_two_evaluations_do_not_share_a_folder(model, paths, tmp_path):
    other, _ = locking_process(tmp_path / "out")
    words = f"in use by process {other.pid} .*or give another --outdir"
    try:
        with pytest.raises(UserError, match=words):
            evaluate.evaluate(model, paths, "tiny", out_dir=tmp_path / "out")
    finally:
        other.kill()
    assert not list((tmp_path / "out").glob("*.bin"))


def test_names_tell_runs_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate.run_name(Path("results/a/7/snapshots/best.pt")) == "results-a-7-snapshots-best"
    assert evaluate.run_name(tmp_path / "checkpoint.pth.tar") == "checkpoint"
    assert evaluate.run_name(Path("ckpt/epoch=9-loss=1.25.ckpt")) == "ckpt-epoch=9-loss=1.25"
    assert evaluate.run_name(Path("/x/weights/small-0.013.pth")) == "small-0.013"
    outside = [evaluate.run_name(Path("/elsewhere", name, "snapshots", "best.pt")) for name in "ab"]
    assert outside[0].startswith("a-snapshots-best-") and outside[0][-6:] != outside[1][-6:]
    assert evaluate.curve_name([Path("a.pth"), Path("b.pth")]) == "a-and-1-more"


@pytest.mark.parametrize("config, expected", [
    ({}, "not recorded"),
    ({"validation": "4 images held out of the training data"}, "4 images held")])
def test_results_say_what_validation_was_and_count_all_steps(config, expected, model, paths):
    model.provenance = Provenance({**config, "steps_before": 70}, 30)
    for result in (evaluate.evaluate(model, paths[:1], "tiny"),
                   evaluate.evaluate_estimate(model, paths[:1], "tiny", 64, {})):
        assert result["meta"]["validation"][0].startswith(expected)
        assert result["meta"]["steps"] == [100]


def test_eval_names_all_bad_images_before_it_codes(tmp_path, monkeypatch, capsys):
    """And two runs with a best.pth each get results, and a CSV, of their own."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.jpg", "c.png", "d.png", ".e.png"):
        photo(tmp_path / "set" / f"{name.strip('.')}", 40, 48)
    for run in "xy":
        model = build(4, 6)
        model.update()
        save_checkpoint(tmp_path / run / "best.pth", {**coding_state(model), "step": 1,
                                                      "config": {"lmbda": 0.01}})
    for name in ("b.jpg", "d.png"):
        path = tmp_path / "set" / name
        path.write_bytes(path.read_bytes()[:-60])
    flags = ["--dataset_path", "set", "--checkpoint"]
    with pytest.raises(UserError, match=r"^2 of 5 images cannot be used: set/b.jpg: .*; set/d"):
        factorized_eval.main([*flags, "x/best.pth"])
    assert not (tmp_path / "output").exists()
    for name in ("b.jpg", "d.png"):
        (tmp_path / "set" / name).unlink()
    (tmp_path / "set" / "e.png").rename(tmp_path / "set" / ".e.png")
    for run in "xy":
        factorized_eval.main([*flags, f"{run}/best.pth"])
    out = capsys.readouterr().out
    assert "set: 2 images, in one folder; skipped: 1 hidden" in out
    assert "nan" not in out  # the MS-SSIM of images of less than 161 pixels a side
    found = {path.name for path in (tmp_path / "results").glob("*.json")}
    assert found == {"Factorized-x-best.json", "Factorized-y-best.json"}
    for run in "xy":
        folder = tmp_path / "output" / "factorized" / f"{run}-best"
        assert {p.name for p in folder.iterdir()} == {"a.bin", "a.png", "c.bin", "c.png",
                                                      "results.json"}
        assert json.loads((folder / "results.json").read_text())["meta"]["images"] == [2]
