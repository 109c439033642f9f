"""The commands of the sources' READMEs, word for word, on tiny data: they run, and write what the
sources write. Flags that make networks and runs tiny follow them. Those of advDNIC are in its own
README, which test_advdnic_commands.py runs.
"""

import json
import runpy
import shlex
import shutil
import sys
from pathlib import Path

from common import cli, data

import forks
import pytest
import torch
from compressai.models import Cheng2020Attention
from PIL import Image

from tbtc import train
from tbtc.tcm import TCM

ROOT = Path(__file__).parents[1]


@pytest.fixture
def type_in(tmp_path, monkeypatch):
    """Runs the script of a command in this process, in an empty folder with tiny images.

    type_in(folder, command, *more): as `cd folder; command more`.
    """
    kodak = Image.open(data.KODAK / "kodim23.png")
    for name in ("train", "test", "valid", "Kodak"):
        (tmp_path / "dataset" / name).mkdir(parents=True)
        for i in range(1 + (name == "train")):
            crop = kodak.crop((200 + 90 * i, 100, 265 + 90 * i, 164))
            crop.save(tmp_path / "dataset" / name / f"{i}.png")
    kodak.crop((100, 100, 197, 165)).save(tmp_path / "test.png")
    monkeypatch.chdir(tmp_path)

    def call(folder, command, *more):
        _, script, *words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", [script, *words, *map(str, more)])
        runpy.run_path(str(ROOT / folder / script), run_name="__main__")
    return call


SEMINAR = """python train.py
--dataset dataset
--test_dataset dataset/test
--lmbda 0.0067
--lr 1e-4
--batch_size 2
--test_batch_size 24
--epoch 1
--model_name {model}
--exp_version 1
--gpu_id '0'
--code_rate 'low'"""
SEMINAR_TINY = "--steps-per-epoch 1 --patch-size 64 --N 4 --M 6 --precision fp32".split()


@pytest.mark.parametrize("folder, model, test", [
    ("factorized", "FactorizedPrior", "python test.py --model_name Factorized --epoch_num 199"),
    ("hyperprior", "Hyperprior", "python test.py --model_name Hyperprior --epoch_num 199"),
    ("joint_ar", "JointAutoregressiveHierarchicalPriors",
     "python test.py --model_name JointAutoregressiveHierarchicalPriors --epoch_num 249"),
    ("checkerboard", "CheckerboardAutogressive",
     "python test.py --model_name CheckerboardAutogressive --epoch_num 249")])
def test_seminar(folder, model, test, type_in):
    type_in(folder, SEMINAR.format(model=model), *SEMINAR_TINY)
    run = Path("ckpts", model, "1")
    assert (Path("logs", model, "1") / "log.txt").read_text().startswith("epoch 0")
    (run / "epoch_0.pth").rename(run / f"epoch_{test.split()[-1]}.pth")  # of a longer training
    type_in(folder, test, "--dataset_path", "dataset/Kodak")
    result, = (json.loads(path.read_text()) for path in Path("results").glob("*.json"))
    assert len(result["results"]["bpp"]) == 1
    files = sorted(path.name for path in Path("output").rglob("*.bin"))
    assert files == ["0.bin"] and len(list(Path("output").rglob("*.png"))) == 1


QVRF = ("python3 train.py  -d ./dataset  -e {} -lr 1e-4 -n 8 --batch-size 8 --test-batch-size 64 "
        "--aux-learning-rate 1e-3 --patch-size 256 256 --cuda --save --seed 1926 --clip_max_norm "
        "1.0  --stage {} ")
QVRF_TINY = "-e 1 -n 0 --batch-size 2 --patch-size 64 64 --steps-per-epoch 1 --N 4".split()
INFERENCE = "python3 Inference.py --dataset ./dataset/Kodak --s {} --output_path AttentionVRSTE " \
            "-p ./Cheng2020VR.pth.tar --patch 64 --factormode {} --factor {}"


def test_qvrf(type_in, capsys, monkeypatch):
    monkeypatch.setattr("qvrf.eval.SWEEP", (0.5, 12))  # of 27 factors
    best = "checkpoint_best_loss.pth.tar"
    type_in("qvrf", QVRF.format(2000, 1) + "--ste 0  --loadFromPretrainedSinglemodel 0", *QVRF_TINY)
    said = capsys.readouterr().out
    if not torch.cuda.is_available():
        assert "note: --cuda: there is no GPU here" in said
    assert "note: --save: without effect; checkpoints are always saved" in said
    torch.save(Cheng2020Attention(4).state_dict(), "cheng2020_attn-mse-6-730501f2.pth.tar")
    for flags in ("--ste 0  --refresh 1 --loadFromPretrainedSinglemodel 0 --checkpoint " + best,
                  "--ste 0  --refresh 1 --loadFromPretrainedSinglemodel 1 --checkpoint "
                  "cheng2020_attn-mse-6-730501f2.pth.tar"):
        type_in("qvrf", QVRF.format(500, 2) + flags, *QVRF_TINY)
    type_in("qvrf", QVRF.format(500, 3) + "--ste 1 --refresh 1 --loadFromPretrainedSinglemodel 0 "
            "--checkpoint checkpoint_best_loss.pth.tar", *QVRF_TINY)
    assert Path("checkpoint.pth.tar").exists()
    type_in("qvrf", "python3 update.py checkpoint_best_loss.pth.tar   -n Cheng2020VR")
    assert len(list(Path().glob("Cheng2020VR-????????.pth.tar"))) == 1
    for rate, folders in (((8, 0, 0), [f"AttentionVRSTE_s_{s}" for s in range(8)]),
                          ((7, 0, 0), ["AttentionVRSTE_s_7"]),
                          ((2, 1, 0.1), ["AttentionVRSTE_factor_0.5", "AttentionVRSTE_factor_12"]),
                          ((2, 1, "1/2.5"), ["AttentionVRSTE_factor_0.4"])):
        type_in("qvrf", INFERENCE.format(*rate))
        for folder in folders:
            names = {path.name for path in Path("dataset", folder).iterdir()}
            assert {"0.png", f"{folder}_result.csv"} <= names
    type_in("qvrf", "python3 Trainningdataset_Preprocessing.py", "--clic", "dataset/Kodak", "--out",
            "made", "--num-workers", "1")
    assert [path.name for path in Path("made").iterdir()] == ["0.png"]


COMMENT = 'python lit_train.py --comment "ema ddp compile full precision TCM-L COCO2017"'
TBTC_TINY = ("--quality XS --dataset dataset --train_batch_size 2 --train_patch_size 64 "
             "--valid_patch_size 64 --steps-per-epoch 1 --num_epochs 1 --num_workers 0 "
             "--devices 0 --no-compile --accelerator cpu").split()


def test_tbtc(type_in):
    type_in("tbtc", COMMENT, *TBTC_TINY, "--model", "zyc2022-conv-hyperprior", "--lmbda", "0.013")
    logs = Path("ckpt", "zyc2022-conv-hyperprior-lambda=0.013-beta=None", "lightning_logs")
    run = logs / "version_0"
    assert "ema ddp compile full precision TCM-L COCO2017" in (run / "hparams.yaml").read_text()
    assert (run / "model.txt").exists() and list(run.glob("events.*"))
    assert len(list((run / "checkpoints").glob("*-best.ckpt"))) == 1
    assert len(list((run / "checkpoints").glob("epoch=0-loss=*-last.ckpt"))) == 1
    torch.manual_seed(0)
    model = TCM(32, 40, 16)
    model.update(force=True)
    path = logs.with_name("Flickr30k") / "version_2" / "epoch=263-loss=1.6261-last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": model.state_dict()}, path)
    type_in("tbtc", f"python eval_model.py checkpoint ./dataset/Kodak  -a tcm --cuda -v -p {path}",
            "-d", "out")
    assert json.loads(Path("out", "tcm-mse-ans.json").read_text())["results"]["bpp"]


def test_tcm_yaml_is_the_recipe_of_the_fork():
    """tbtc.md 3.1 and 4; two GPUs make the learning rate 1e-4 * 2 * 8 / 16 = 1e-4."""
    args = cli.parse(train.flags(), ["--config", str(ROOT / "tbtc" / "tcm.yaml")])
    fork = {"model": "tcm", "quality": "L", "lmbda": 0.013, "beta": None, "train_batch_size": 8,
            "valid_batch_size": 1, "valid_patch_size": [256, 256], "num_workers": 16,
            "devices": [1, 0], "num_epochs": 200, "seed": 1234, "net_lr": 1e-4, "scale_lr": True,
            "validation_cadence": 1, "gradient_clip_norm": 2.0, "ema": True, "compile": True,
            "precision": "32-true", "float32_matmul_precision": "high", "quantiles": "periodic",
            "quantiles_every": 1800, "warmup": 0.01, "flip": True, "optimizer": "adam"}
    assert {key: getattr(args, key) for key in fork} == fork


CONVNEXTIC_TINY = ("--trainset dataset --embed_dim 4 --latent_dim 24 --depths 1 1 1 1 1 1 "
                   "--patchsize 64 --batchsize 2 --steps-per-epoch 1 --epochs 1 --worker_num 0 "
                   "--precision fp32").split()


def test_convnextic(type_in, capsys):
    shutil.copy(ROOT / "convnextic" / "config.yaml", "config.yaml")
    train = "python train.py --config=./config.yaml --name=nic_cvt"
    type_in("convnextic", train, *CONVNEXTIC_TINY)
    run = Path("results", "nic_cvt", "7")
    assert (run / "config.yaml").exists() and list((run / "logs").iterdir())
    kept = (run / "snapshots" / "best.pt").read_bytes()
    capsys.readouterr()
    type_in("convnextic", f"{train} --resume '{run}/snapshots/best.pt'", *CONVNEXTIC_TINY,
            "--log_itr", "1000", "--epochs", "2", "--startepoch", "1")
    said = capsys.readouterr().out
    assert "--log_itr: without effect" in said and f"kept as {run}_1" in said
    assert Path(f"{run}_1", "snapshots", "best.pt").read_bytes() == kept
    assert [path.name[:4] for path in (run / "snapshots").glob("0*.pt")] == ["001_"]
    shutil.copytree(run, "results/tic_/8")
    type_in("convnextic", "python eval.py --snapshot='./results/tic_/8/snapshots/best.pt' "
            "--quality=8", "--testset", "dataset/Kodak")
    type_in("convnextic", "python codec.py encode --model nic -m mse -q 1 -o compressed.bin "
            "test.png")
    type_in("convnextic", "python codec.py decode -o out.png compressed.bin")
    assert Image.open("out.png").size == Image.open("test.png").size


ALIASES = [*(f"{paper}/test.py" for paper in ("factorized", "hyperprior", "joint_ar",
                                              "checkerboard")),
           "qvrf/Inference.py", "qvrf/Trainningdataset_Preprocessing.py", "tbtc/eval_model.py",
           "tbtc/lit_train.py"]
IN_ANOTHER_CLONE = """
import os, runpy, sys
root, other, *scripts = sys.argv[2:]
others = [p for p in sys.path[1:] if not os.path.exists(os.path.join(p, "common", "clone.py"))]
kept = dict(sys.modules)  # so that what a library has registered stays
for script in scripts:
    for name in [n for n in sys.modules if n.split(".")[0] in os.listdir(root)]:
        del sys.modules[name]
    sys.path[:] = [os.path.join(root, os.path.dirname(script)), *others, other]
    main = runpy.run_path(os.path.join(root, script))["main"]
    print(sys.modules[main.__module__].__file__, sys.modules["common"].__file__)
"""


def test_aliases_run_this_clone(tmp_path):
    """Not installed, or beside a clone that is: both the paper and `common` are this clone's."""
    for name in ("common", "factorized", "hyperprior", "joint_ar", "checkerboard", "qvrf", "tbtc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the installed clone')")
    said, _ = forks.run("-c", IN_ANOTHER_CLONE, ROOT, tmp_path, *ALIASES, cwd=tmp_path)
    files = said.split()
    assert len(files) == 2 * len(ALIASES)
    assert all(Path(file).is_relative_to(ROOT) for file in files)


def test_a_script_without_its_packages_says_what_to_install(type_in):
    """python3 train.py on a fresh clone, with a Python that has none of the packages."""
    import subprocess

    for folder in ("hyperprior", "advdnic"):
        done = subprocess.run([sys.executable, "-S", "-E", ROOT / folder / "train.py"],
                              capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "torch" in done.stderr and "requirements-nodeps.txt -e ." in done.stderr
