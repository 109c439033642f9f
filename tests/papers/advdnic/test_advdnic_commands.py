"""advDNIC: flags, params.json, the source's commands, bundled weights, the README."""

import csv
import io
import json
import re
import shlex
from pathlib import Path

from common import UserError, cli, data

import pytest
import torch
from advdnic_cases import ROOT
from PIL import Image

from advdnic import codec, main, params, train
from advdnic import eval as advdnic_eval
from advdnic.model import EXPERIMENTS


# -------------------------------------------------------------------------------- flags, commands
@pytest.mark.parametrize("text, value", [("False", False), ("false", False), ("0", False),
                                         ("no", False), ("True", True), ("1", True), ("yes", True)])
def test_flags_mean_what_they_say(text, value):
    """The source takes --xla=False as true."""
    args = main.parser_of().parse_args(["--model-dir", "m", "train", f"--xla={text}",
                                        f"--allow-growth={text}"])
    assert args.xla is value and args.allow_growth is value
    bench = main.parser_of().parse_args(["--model-dir", "m", "benchmark", f"--allow-growth={text}"])
    assert bench.allow_growth is value


def test_defaults_are_the_source_s():
    args = main.parser_of().parse_args(["--model-dir", "m", "train"])
    assert (args.batchsize, args.num_parallel_calls, args.epochs, args.save_summary_steps,
            args.random_seed, args.allow_growth, args.xla, args.save_profiling_steps,
            args.log_verbosity) == (4, 4, 1000, 100, None, True, False, 0, "INFO")


@pytest.mark.parametrize("flags, message", [
    (["--use_adversarial_loss=True", "--model-dir", "m", "train"], "no discriminator"),
    (["train"], "--model-dir: name the folder"),
    (["--model-dir", "m", "train", "--xla=perhaps"], "invalid boolean value"),
    (["--model-dir", "m", "compress", "a.png"], "params.json: there is none"),
    (["--model-dir", "m", "train", "--experiment", "mod5"], "invalid choice"),
    (["--model-dir", "m", "train", "--patchsize", "100"], "multiple of 64"),
    (["--model-dir", "m", "train", "--experiment", "variant4", "--num_filters", "64"],
     "needs num_filters 128"),
    (["--model-dir", "m", "train", "--aux_optimizer", "muon"], "main parameters only")])
def test_mistakes(flags, message, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "train" in flags:
        flags = [*flags, "--train-data-dir", str(images)]
        flags += [] if "--patchsize" in flags else ["--patchsize", "64"]
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main.main(flags))
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [
    ("{", "not JSON"), ("[]", "one object"), ('{"lmda": 1}', "there is no parameter lmda"),
    ('{"num_filters": "128"}', "is not int"), ('{"lmbda": -1}', "positive"),
    ('{"num_filters": true}', "is not int"), ('{"clip_norm": -1}', "0 or more"),
    ('{"scales_min": 5, "scales_max": 1}', "below scales_max"),
    ('{"experiment": "mod9"}', "choose from base")])
def test_broken_params(text, message, tmp_path):
    (tmp_path / "params.json").write_text(text)
    with pytest.raises(UserError, match=message):
        params.read(tmp_path)


def test_params_win_over_defaults_and_flags_over_params(fit):
    folder = fit(experiment="mod1")
    with pytest.raises(UserError, match="another --model-dir"):
        fit("--lmbda", "0.02", "--resume", experiment="mod1")
    values = params.read(folder)
    params.write(folder, {**values, "experiment": "mod4"})
    with pytest.raises(UserError, match="is of experiment mod1, params.json says mod4"):
        main.newest(folder, torch.device("cpu"))


def test_the_source_s_commands(fit, images, tmp_path, monkeypatch, capsys):
    """compress and decompress of the seed, with its default names, report and figure."""
    folder = fit()
    monkeypatch.chdir(tmp_path)
    Image.open(images / "0.png").save("overfit.png")
    main.main(["--verbose", f"--model-dir={folder}", "compress", "overfit.png"])
    main.main(["--verbose", f"--model-dir={folder}", "decompress", "overfit.png.ncf"])
    assert Image.open("overfit.png.ncf.png").size == (160, 130)
    report = Path("overfit.png.ncf.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in report] == [
        "Mean squared error", "PSNR (dB)", "Multiscale SSIM", "Multiscale SSIM (dB)",
        "Information content in bpp", "Actual bits per pixel"]
    size = Path("overfit.png.ncf").stat().st_size
    assert float(report[-1].split(":")[1]) == pytest.approx(8 * size / (160 * 130), abs=1e-4)
    assert Image.open("overfit.png.ncf.panels.png").size == (1600, 640)
    with pytest.raises(UserError, match="another model|fingerprint|weights"):
        other = fit(folder="other", experiment="mod4")
        main.main([f"--model-dir={other}", "decompress", "overfit.png.ncf"])
    for content in (b"", b"NCF?", b"\n\x12\n\x10\n\x01\x01\x12\x0b\n\t"):  # the last: the source's
        Path("foreign.ncf").write_bytes(content)
        with pytest.raises(UserError, match="foreign.ncf|file is empty|not one of our"):
            main.main([f"--model-dir={folder}", "decompress", "foreign.ncf"])
    for path in folder.glob("epoch_*"):
        path.unlink()
    with pytest.raises(UserError, match="holds no checkpoint"):
        main.main([f"--model-dir={folder}", "compress", "overfit.png"])


def test_benchmark(fit, images, tmp_path):
    folder = fit()
    main.main([f"--model-dir={folder}", "benchmark", "--data-dir", str(images),
               "--allow-growth=False"])
    rows = list(csv.DictReader(io.StringIO(
        (folder / "benchmark" / "compression_metrics.csv").read_text())))
    assert [row["image"] for row in rows] == ["0", "1", "2", "mean"]
    for key in ("actual bpp", "psnr", "bytes", "decoding seconds"):
        values = [float(row[key]) for row in rows[:3]]
        assert float(rows[3][key]) == pytest.approx(sum(values) / 3, rel=1e-4)
    for row in rows[:3]:  # each row is of its own image
        x = data.read_image(images / f"{row['image']}.png")
        size = (folder / "benchmark" / f"{row['image']}.ncf").stat().st_size
        assert float(row["actual bpp"]) == pytest.approx(8 * size / x[0].numel(), rel=1e-4)
        decoded = data.read_image(folder / "benchmark" / f"{row['image']}.png")
        mse = (decoded.double() - x.double()).square().mean()
        assert float(row["mse"]) == pytest.approx(mse.item(), rel=1e-3)


def test_benchmark_without_decoding(fit, images):
    folder = fit()
    main.main([f"--model-dir={folder}", "benchmark", "--data-dir", str(images), "--no-decode"])
    rows = list(csv.DictReader(io.StringIO(
        (folder / "benchmark" / "compression_metrics.csv").read_text())))
    assert all(row["decoding seconds"] == "" and float(row["encoding seconds"]) > 0
               for row in rows)
    assert not list((folder / "benchmark").glob("*.png"))


def test_benchmark_says_when_a_file_decodes_to_something_else(fit, images, monkeypatch):
    folder, decode = fit(), main.image_file.decode_image
    monkeypatch.setattr(main.image_file, "decode_image", lambda *args: decode(*args) * 0.9)
    with pytest.raises(UserError, match="0.png: its file decodes to another image"):
        main.main([f"--model-dir={folder}", "benchmark", "--data-dir", str(images)])


@pytest.mark.parametrize("command", [
    ["compress", "a.png", "a.png"], ["compress", "a.png", "o.ncf", "--plot", "a.png"],
    ["compress", "a.png", "o.ncf", "--plot", "o.ncf"], ["-V", "compress", "o.panels.png", "o"],
    ["decompress", "o.ncf", "o.ncf"], ["benchmark", "--data-dir", ".", "--outdir", "."]])
def test_nothing_is_replaced(command, fit, images, tmp_path, monkeypatch):
    folder, photos = fit(), tmp_path / "photos"
    photos.mkdir()
    monkeypatch.chdir(photos)
    for name in ("a.png", "o.panels.png"):
        Path(name).write_bytes((images / "0.png").read_bytes())
    main.main([f"--model-dir={folder}", "compress", "a.png", "o.ncf"])
    before = {path: path.read_bytes() for path in photos.iterdir()}
    options = [command.pop(0)] if command[0] == "-V" else []
    with pytest.raises(UserError, match="would replace"):
        main.main([f"--model-dir={folder}", *options, *command])
    assert {path: path.read_bytes() for path in photos.iterdir()} == before


@pytest.mark.parametrize("text", ['{"num_filters": Infinity}', '{"num_filters": NaN}',
                                  '{"lmbda": ' + 400 * "9" + "}", '{"lmbda": NaN}'])
def test_numbers_of_params_are_numbers(text, tmp_path):
    (tmp_path / params.NAME).write_text(text)
    with pytest.raises(UserError, match="(num_filters|lmbda) .* is not (int|float)"):
        params.read(tmp_path)


# ----------------------------------------------------------------------------- bundled, README
def test_bundled_weights_code(tmp_path):
    photo, file, out = (str(tmp_path / n) for n in ("a.png", "a.bin", "b.png"))
    Image.open(data.KODAK / "kodim07.png").crop((0, 0, 300, 200)).save(photo)
    codec.main(["encode", photo, "-o", file])
    codec.main(["decode", file, "-o", out])
    a, b = data.read_image(Path(photo)).double(), data.read_image(Path(out)).double()
    assert 10 * torch.log10(255**2 / (a - b).square().mean()) > 25


def test_pages_give_the_bundled_results():
    results = json.loads((ROOT / "advdnic" / "results" / "small.json").read_text())["results"]
    page, front = ((ROOT / name).read_text() for name in ("advdnic/README.md", "RESULTS.md"))
    for bpp, psnr in zip(results["bpp"], results["psnr-rgb"], strict=True):
        assert f"| {bpp:.4f} | {psnr:.2f} |" in page and f"| {bpp:.4f} | {psnr:.2f} |" in front


def test_complexity(capsys):
    advdnic_eval.main(["--complexity"])
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(rows) == list(EXPERIMENTS) and rows["base"][0] == "4,516,611"
    page = (ROOT / "advdnic" / "README.md").read_text()
    for name, (count, encoder, decoder, _) in rows.items():
        assert re.search(rf"\| `{name}` .*{count}.*{encoder}.*{decoder}", page)


def test_readme_commands(tmp_path, monkeypatch):
    """In their order, in one folder, as a reader would type them; only sizes are made tiny."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "advdnic" / "README.md").read_text(), re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in text.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("python ")]
    assert {c[0] for c in commands} == {"train.py", "main.py", "eval.py", "codec.py"}
    kodak = Image.open(data.KODAK / "kodim23.png")
    for folder in ("data/train", "data/benchmark/kodak"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(2):
            kodak.crop((200, 100, 330, 230)).save(tmp_path / folder / f"{i}.png")
    for name in ("overfit.png", "photo.png"):
        kodak.crop((200, 100, 330, 230)).save(tmp_path / name)
    for config in ("quick.yaml", "ten.yaml", "config.yaml"):
        (tmp_path / config).write_text((ROOT / "advdnic" / config).read_text())
    monkeypatch.chdir(tmp_path)
    tiny_run = {"--epochs": "1", "--steps-per-epoch": "1", "--patchsize": "64",
                "--num_filters": "8", "--eval-patchsize": "64", "--num-parallel-calls": "0",
                "--threads": "1"}
    modules = {"train.py": train, "main.py": main, "eval.py": advdnic_eval, "codec.py": codec}
    for script, *arguments in commands:
        if script == "train.py" or "train" in arguments:
            kept = {a.split("=")[0] for a in arguments}
            for flag, value in tiny_run.items():
                if "variant4" in " ".join(arguments) and flag == "--num_filters":
                    continue
                arguments = [a for a in arguments if a.split("=")[0] != flag]
                arguments += [f"{flag}={value}"]
            if "--train-data-dir" not in kept:
                arguments += ["--train-data-dir=data/train"]
            arguments += ["--eval-data-dir=data/benchmark/kodak"]
        elif script == "eval.py" and "--complexity" not in arguments:
            arguments += ["--dataset", "data/benchmark/kodak", "--resultdir", "r"]
        elif "benchmark" in arguments and "--data-dir" not in " ".join(arguments):
            arguments += ["--data-dir", "data/benchmark/kodak"]
        modules[script].main(arguments)
