"""QVRF: update.py, eval.py, preprocess.py, plot.py; the commands and numbers of the README."""

import csv
import importlib
import json
import re
import shlex
from pathlib import Path

from common import UserError, data

import pytest
import torch
from PIL import Image
from qvrf_cases import ROOT, TINY, read, tiny

from qvrf import codec, plot, preprocess, update
from qvrf import eval as evaluation


# --------------------------------------------------------------------------------------- tools
@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "checkpoint_best_loss.pth.tar"
    torch.save({"state_dict": tiny("minnen").state_dict()}, path)
    return path


def test_update_names_after_the_hash(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags, stem, folder in (([], "checkpoint_best_loss", "."),
                                (["-n", "Cheng2020VR", "-d", "out", "--no-update"], "Cheng2020VR",
                                 "out")):
        update.main([str(weights), *flags])
        path = Path(capsys.readouterr().out.strip())
        assert path.parent == Path(folder)
        name, digest = path.name.removesuffix(".pth.tar").rsplit("-", 1)
        assert name == stem and len(digest) == 8 and int(digest, 16) >= 0
        assert set(read(path)) == set(tiny("minnen").state_dict())
    assert evaluation.exported(Path("out/Cheng2020VR.pth.tar")) == path
    with pytest.raises(UserError, match="'Gain' is missing"):
        torch.save({"a": torch.ones(1)}, "a.pth")
        update.main(["a.pth"])


@pytest.mark.parametrize("text, value", [("1.5", 1.5), ("1/2.5", 0.4), ("3", 3), ("2/3", 2 / 3)])
def test_factors(text, value):
    assert evaluation.factor(text) == pytest.approx(value)


@pytest.mark.parametrize("text, message", [
    ("0", "positive"), ("-2", "positive"), ("nan", "not a number"), ("1/0", "not a number"),
    ("inf", "not a number"), ("x", "not a number"), ("1e400/1", "not a number"),
    ("1/2/3", "not a number"), ("1e999999999/1", "not a number")])
def test_wrong_factors(text, message, weights, images, capsys):
    for main, flags in ((evaluation.main, ["--factormode", "1", "-p", str(weights), "--dataset",
                                           str(images / "test"), f"--factor={text}"]),
                        (codec.main, ["encode", str(images / "test/0.png"), "--checkpoint",
                                      str(weights), f"--factor={text}"])):
        try:
            main(flags)
        except UserError as e:
            assert message in str(e)
        except SystemExit as e:
            assert e.code == 2 and message in capsys.readouterr().err
        else:
            pytest.fail("was accepted")


def test_eval_as_the_source_calls_it(weights, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "set"
    folder.mkdir()
    for path in (images / "test").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    call = ["--dataset", str(folder), "--output_path", "VR", "-p", str(weights), "--patch", "64"]
    evaluation.main([*call, "--s", "8", "--factormode", "0", "--factor", "0"])
    out = capsys.readouterr().out
    printed = json.loads(out[out.index("{"):])
    assert printed["description"] == "Inference (ans)"
    assert len(printed["results"]["bpp"]) == 8
    assert printed["results"]["bpp"] == sorted(printed["results"]["bpp"])
    rows = list(csv.reader((tmp_path / "VR_s_3" / "VR_s_3_result.csv").open()))
    assert rows[0] == list(evaluation.COLUMNS) and [r[0] for r in rows[1:]] == ["0.png", "1.png"]
    assert (tmp_path / "VR_s_3" / "0.png").exists()
    bits = 8 * (tmp_path / "VR_s_3" / "0.bin").stat().st_size
    assert float(rows[1][1]) == bits
    evaluation.main([*call, "--factormode", "1", "--factor", "1/2"])
    assert (tmp_path / "VR_factor_0.5" / "VR_factor_0.5_result.csv").exists()
    evaluation.main([*call, "--s", "2", "--entropy-estimation"])
    estimated = list(csv.reader((tmp_path / "VR_s_2" / "VR_s_2_result.csv").open()))
    assert float(estimated[1][3]) > 0 and estimated[1][9] == ""


def test_the_source_s_sweep(weights, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluation.main(["--dataset", str(images / "test"), "-p", str(weights), "--factormode", "1",
                     "--factor", "0.1"])
    path, = (tmp_path / "results").glob("QVRF-*.json")  # named by the folder of the run
    results = json.loads(path.read_text())
    assert sorted(results["meta"]["factor"]) == pytest.approx(list(evaluation.SWEEP))
    assert "sweep of 27 factors" in capsys.readouterr().out


# ------------------------------------------------------------------------------- preprocessing
def test_preprocessing(tmp_path):
    """The largest n by header, all of CLIC, halved where large, equal stems kept apart."""
    sizes = {"a.png": (40, 30), "b.png": (600, 520), "c.png": (520, 600), "d.png": (10, 10),
             "e/a.jpg": (60, 60)}
    for name, size in sizes.items():
        path = tmp_path / "imagenet" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize(size).convert("RGB").save(path)
    (tmp_path / "clic").mkdir()
    Image.new("RGB", (20, 20), (255, 0, 254)).save(tmp_path / "clic" / "z.png")
    preprocess.main(["--imagenet", str(tmp_path / "imagenet"), "--clic", str(tmp_path / "clic"),
                     "--out", str(tmp_path / "out"), "-n", "4", "--num-workers", "1"])
    made = {p.name: Image.open(p).size for p in (tmp_path / "out").iterdir()}
    assert made == {"b.png": (300, 260), "c.png": (260, 300), "a.png": (60, 60),
                    "a_2.png": (40, 30), "z.png": (20, 20)}
    original = data.read_image(tmp_path / "imagenet" / "a.png")
    assert torch.equal(data.read_image(tmp_path / "out" / "a_2.png"), original)  # a no-op noise
    with pytest.raises(UserError, match="9 images were asked for, 5 are there"):
        preprocess.main(["--imagenet", str(tmp_path / "imagenet"), "-n", "9"])
    for out in ("imagenet", "imagenet/e", "."):
        with pytest.raises(UserError, match="mix with the originals"):
            preprocess.main(["--imagenet", str(tmp_path / "imagenet"), "-n", "4",
                             "--out", str(tmp_path / out)])


def test_plot_wants_results_of_eval(tmp_path):
    curve = {"name": "a", "description": "", "results": {"bpp": [1, 2], "psnr-rgb": [30, 31]}}
    for meta, words in (({}, "holds no level of its points"),
                        ({"level": [0, None]}, "holds no level of its points"),
                        (None, '"meta" must hold'), ({"level": [0]}, "level has 1 entries")):
        (tmp_path / "a.json").write_text(json.dumps(curve | {"meta": meta}))
        with pytest.raises(UserError, match=words):
            plot.main([str(tmp_path / "a.json"), str(tmp_path / "a.json")])


# --------------------------------------------------------------------------------------- pages
def test_readme_commands(tmp_path, monkeypatch):
    """In their order, in one folder, as a reader would type them; only sizes are made tiny."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "qvrf" / "README.md").read_text(), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("python ")]
    assert {c[0] for c in commands} == {"train.py", "update.py", "eval.py", "plot.py", "codec.py",
                                        "preprocess.py"}
    kodak = Image.open(data.KODAK / "kodim23.png")
    for folder in ("dataset/train", "dataset/test", "dataset/Kodak", "imagenet", "clic"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(2):
            kodak.crop((200 + 90 * i, 100, 296 + 90 * i, 190)).save(tmp_path / folder / f"{i}.png")
    kodak.crop((100, 100, 197, 165)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    for script, *words in commands:
        if script == "train.py":
            words = [str(ROOT / "qvrf" / w) if w.endswith(".yaml") else w for w in words]
            words += [*TINY, "--no-compile"]
        elif script == "eval.py" and "--dataset" not in words:
            words += ["--dataset", "dataset/Kodak"]
        elif script == "preprocess.py":
            words += ["-n", "2", "--num-workers", "1"]
        importlib.import_module(f"qvrf.{script.removesuffix('.py')}").main(words)
    assert Image.open("decoded.png").size == (97, 65)
    assert read("runs/a/checkpoint.pth.tar")["config"]["stage"] == 3
    assert read("ckpts/quick/checkpoint.pth.tar")["config"]["steps_before"] == 8
    assert Path("dataset/AttentionVRSTE_s_7/0.png").exists()
    assert Path("dataset/AttentionVRSTE_factor_0.4/0.png").exists()


def test_pages_give_the_bundled_results():
    results = json.loads((ROOT / "qvrf" / "results" / "small.json").read_text())["results"]
    rows = {f"| {bpp:.4f} | {psnr:.2f} |"
            for bpp, psnr in zip(results["bpp"], results["psnr-rgb"], strict=True)}
    assert len(rows) == 8 and all(row in (ROOT / "qvrf" / "README.md").read_text() for row in rows)
    front = [line for line in (ROOT / "RESULTS.md").read_text().splitlines()
             if line.startswith("| qvrf (balle), level")]
    assert len(front) >= 2 and all(any(row in line for row in rows) for line in front)


def test_readme_python(tmp_path, monkeypatch):
    (tmp_path / "qvrf").symlink_to(ROOT / "qvrf")
    Image.open(data.KODAK / "kodim23.png").crop((100, 100, 197, 165)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    block, = re.findall(r"```python\n(.*?)```", (ROOT / "qvrf" / "README.md").read_text(), re.S)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["x_hat"].shape == names["x"].shape
    assert 8 * len(names["file"]) / names["x"][0].numel() <= 0.5
