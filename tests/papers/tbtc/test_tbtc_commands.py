"""TBTC: eval.py as the source calls it, bundled weights, the commands and numbers of the README."""

import importlib
import json
import re
import shlex
from pathlib import Path

from common import UserError, data, metrics
from common.coding import image_file

import pytest
import torch
from PIL import Image
from tbtc_cases import ROOT, photograph, tiny

from tbtc import eval as tbtc_eval
from tbtc.model import load


# -------------------------------------------------------------------------------------- evaluation
def test_eval_model_s_command(images, tmp_path, monkeypatch, capsys):
    model = tiny("zyc2022-conv-charm")
    torch.save(model.state_dict(), tmp_path / "epoch=1-loss=2.0000-last.ckpt")
    monkeypatch.chdir(tmp_path)
    words = ["checkpoint", str(images / "valid"), "-a", "zyc2022-conv-charm", "-v", "-d", "out",
             "-p", "epoch=1-loss=2.0000-last.ckpt"]
    tbtc_eval.main([*words[:-2], "--per-image", *words[-2:]])
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "zyc2022-conv-charm-mse-ans.json").read_text())
    assert written["description"] == "Inference (ans)" and '"image"' in printed
    assert set(written["results"]) == {"psnr-rgb", "ms-ssim-rgb", "bpp", "encoding_time",
                                       "decoding_time"}
    tbtc_eval.main([*words[:2], "--entropy-estimation", "-o", "estimate", *words[-2:]])
    estimate = json.loads((tmp_path / "estimate.json").read_text())
    assert estimate["description"] == "Inference (entropy estimation)"
    assert estimate["results"]["psnr-rgb"] == pytest.approx(written["results"]["psnr-rgb"])
    with pytest.raises(UserError, match="not of -a tcm"):
        tbtc_eval.main([*words[:2], "-a", "tcm", *words[-2:]])
    with pytest.raises(UserError, match="name weights with -p"):
        tbtc_eval.main(words[:2])


# ------------------------------------------------------------------------------------------- pages
@pytest.mark.parametrize("path", sorted((ROOT / "tbtc" / "weights").glob("*.pth")),
                         ids=lambda path: path.stem)
def test_bundled_weights_code(path):
    """Better than 25 dB for less than a bit a pixel, and as many bytes as estimated."""
    model, x = load(path), photograph(256, 320)
    with torch.no_grad():
        output = model(x)
    file = image_file.encode_image(model, x)
    bits = -sum(p.log2().sum() for p in output["likelihoods"].values())
    assert 8 * (len(file) - 29) == pytest.approx(float(bits), rel=0.01)
    assert 8 * len(file) < 256 * 320
    assert metrics.psnr(data.to_uint8(image_file.decode_image(model, file)),
                        data.to_uint8(x)[0]) > 25


def test_pages_give_the_bundled_results():
    found = json.loads((ROOT / "tbtc" / "results" / "small.json").read_text())
    assert len(found["results"]["bpp"]) == len(list((ROOT / "tbtc" / "weights").glob("*.pth")))
    page, front = ((ROOT / name).read_text() for name in ("tbtc/README.md", "RESULTS.md"))
    for bpp, psnr in zip(found["results"]["bpp"], found["results"]["psnr-rgb"], strict=True):
        assert f"| {bpp:.4f} | {psnr:.2f} |" in page and f"| {bpp:.4f} | {psnr:.2f} |" in front


def test_readme_commands(tmp_path, monkeypatch):
    """In their order, in one folder, as a reader would type them; only sizes are made tiny."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "tbtc" / "README.md").read_text(), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("python ")]
    assert {c[0] for c in commands} == {"train.py", "lit_train.py", "eval.py", "codec.py"}
    kodak = Image.open(data.KODAK / "kodim23.png")
    for folder in ("clic/train", "clic/valid", "coco", "kodak"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(2):
            kodak.crop((90 * i, 100, 128 + 90 * i, 230)).save(tmp_path / folder / f"{i}.png")
    kodak.crop((100, 100, 280, 165)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    tiny = ("--quality XS --train_batch_size 2 --train_patch_size 64 --valid_patch_size 64 "
            "--steps-per-epoch 1 --num_epochs 1 --num_workers 0 --precision fp32 --devices 0 "
            "--no-compile").split()
    for script, *words in commands:
        words = [str(ROOT / "tbtc" / w) if w.endswith(".yaml") else w for w in words]
        words = [str(found) for w in words
                 for found in (sorted(Path().glob(w)) if "*" in w else [w])]
        if "train.py" in script:
            words += tiny if "--dataset" in words else [*tiny, "--dataset", "clic"]
        elif script == "eval.py" and not words:
            words = ["pretrained", "kodak"]
        importlib.import_module(f"tbtc.{script.removesuffix('.py').removeprefix('lit_')}").main(words)
    assert Image.open("decoded.png").size == (180, 65)
