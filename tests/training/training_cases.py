"""Flags, processes and comparisons that the tests of training share."""

from pathlib import Path

import forks
import torch

ROOT = Path(__file__).parents[2]
TINY = ("--steps-per-epoch 6 --batch_size 2 --patch-size 64 --N 4 --M 6 --precision fp32 "
        "--seed 3 --lr 0.001").split()


def process(images, cwd, *flags, paper="hyperprior"):
    """train.py of a paper in a process of its own."""
    return forks.start(*command(images, *flags, paper=paper), cwd=cwd)


def command(images, *flags, paper="hyperprior"):
    return (ROOT / paper / "train.py", *TINY, "--dataset", images, "--test_dataset",
            images / "test", *flags)


def assert_equal(a, b, where="checkpoint"):
    """Two checkpoints, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("resume", "load_model_epoch"):
                assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def load(folder, epoch, prefix="Hyperprior"):
    return torch.load(folder / "ckpts" / prefix / "0" / f"epoch_{epoch}.pth", weights_only=True)
