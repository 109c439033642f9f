"""A file written by one process decodes in others, whatever their threads, layout and instructions.

The same settings make the float path disagree with itself: that is why h_s is exact.
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

from common.coding import image_file

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = {  # name: (environment, worker flags)
    "1 thread": ({}, ["--threads", "1"]),
    "2 threads": ({}, ["--threads", "2"]),
    "AVX2": ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, ["--threads", "2"]),
    "ATen without vector instructions": ({"ATEN_CPU_CAPABILITY": "default"}, ["--threads", "1"]),
    "oneDNN off": ({}, ["--threads", "2", "--no-onednn"]),
    "contiguous": ({}, ["--threads", "2", "--contiguous"]),
}
MODELS = {  # name: (paper, weights, rates of its files)
    **{paper: (paper, sorted((ROOT / paper / "weights").glob("small-*.pth"))[-1].name, [{}])
       for paper in ("factorized", "hyperprior", "joint_ar", "checkerboard")},
    "qvrf balle": ("qvrf", "small-balle.pth", [{"s": 5}, {"factor": 3.7}]),
    "qvrf minnen": ("qvrf", "small-minnen.pth", [{"s": 5}, {"factor": 3.7}]),
    "convnextic": ("convnextic", "small-vr.pth", [{"lmbda": 0.001}, {"lmbda": 0.01}]),
}
RANDOM = {  # small networks of random weights
    "convnextic": ("v0_ln", "v1_patch", "v2_stride2", "v3_scctx", "v4_ea", "v5_vr"),
    "tbtc": ("zyc2022-conv-hyperprior", "zyc2022-conv-charm", "zyc2022-swint-hyperprior",
             "zyc2022-swint-charm", "tcm"),
    "advdnic": ("base", "mod1", "mod2", "mod3", "mod4", "variant1", "variant2", "variant3",
                "variant3_old", "variant4")}
VARIANTS = [variant for variants in RANDOM.values() for variant in variants]
for paper, variants in RANDOM.items():
    for variant in variants:
        MODELS[variant] = (paper, f"{variant}.pth", [{"lmbda": 0.02} if "vr" in variant else {}])
IMAGES = ("kodim08", "kodim13")


def work(setting, *arguments):
    environment, flags = SETTINGS[setting]
    command = [sys.executable, str(Path(__file__)), *flags, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                          cwd=ROOT, check=True,
                          stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return folder, work("2 threads", "encode", folder)


@pytest.fixture(scope="module")
def decoded(encoded):
    folder, _ = encoded
    return {setting: work(setting, "decode", folder) for setting in SETTINGS}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_decodes_the_encoder_s_symbols(setting, encoded, decoded):
    assert len(encoded[1]) == sum(len(rates) for _, _, rates in MODELS.values()) * len(IMAGES)
    assert decoded[setting]["symbols"] == encoded[1]


def test_float_path_differs_between_settings(decoded):
    """Scales of the float h_s cross a table boundary somewhere, and one crossing ruins a stream."""
    indexes = [decoded[setting]["float_indexes"] for setting in SETTINGS]
    assert any(a != indexes[0] for a in indexes[1:])


# ----------------------------------------------------- what runs in the other processes
def _digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def _random_weights(path, paper):
    """A small network whose blocks do something and whose latents are not all zero."""
    import torch

    torch.manual_seed(0)
    options = {}
    if paper == "tbtc":
        from tbtc.model import build

        model = build(path.stem, "XS")
        layers, factor = ([model.g_a.layers[3].blocks[1].mlp.fc2] if "swint" in path.stem
                          else [model.g_a[-1]]), 8
    elif paper == "advdnic":
        from advdnic.model import build

        options = {"experiment": path.stem}
        model = build(path.stem, 128 if path.stem == "variant4" else 16)
        layers, factor = [[m for m in model.g_a.modules() if isinstance(m, torch.nn.Conv2d)][-1]], 8
    else:
        from convnextic.model import build

        options = {"variant": path.stem, "layer_scale_init": 0.5}
        model = build(**options, embed_dim=8, latent_dim=24)
        layers, factor = [next(m for m in part.down if isinstance(m, torch.nn.Conv2d))
                          for part in (model.g_a[3], model.h_a[1])], 6
    with torch.no_grad():
        for layer in layers:
            layer.weight *= factor
    model.update(force=True)
    torch.save({"model": model.state_dict(), "config": options}, path)


def _main():
    import argparse
    import importlib

    import common  # noqa: F401  (first)
    from common import data
    from common.coding import entropy

    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-onednn", action="store_true")
    parser.add_argument("--contiguous", action="store_true")
    parser.add_argument("job")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.mkldnn.enabled = not args.no_onednn
    layout = torch.contiguous_format if args.contiguous else torch.channels_last

    symbols, float_indexes = {}, {}
    for name, (folder, weights, rates) in MODELS.items():
        paper = importlib.import_module(f"{folder}.model")
        path = (args.folder if name in VARIANTS else ROOT / folder / "weights") / weights
        if name in VARIANTS and args.job == "encode":
            _random_weights(path, folder)
        model = paper.load(path).to(memory_format=layout)
        seen = []
        if folder == "convnextic":  # its g_s is called stage by stage
            synthesize = model.synthesize
            model.synthesize = lambda y_hat, *rest, seen=seen, synthesize=synthesize: (
                seen.append(y_hat), synthesize(y_hat, *rest))[1]
        model.g_s.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        for image, (i, rate) in itertools.product(IMAGES, enumerate(rates)):
            path = args.folder / f"{name}-{image}-{i}.bin"
            if args.job == "encode":
                x = data.to_float(data.read_image(data.KODAK / f"{image}.png"))
                x = x[:, :200, :300] if name in VARIANTS else x
                path.write_bytes(image_file.encode_image(model, x, **rate))
            image_file.decode_image(model, path.read_bytes())
            symbols[path.name] = _digest(seen.pop())
        if name == "hyperprior":
            for seed in range(4):  # the same z_hat in all settings
                torch.manual_seed(seed)
                z = 4 * torch.randn(1, model.N, 32, 48)
                z_hat = entropy.dequantize(model.entropy_bottleneck, z)
                z_hat = z_hat.contiguous(memory_format=layout)
                with torch.no_grad():
                    indexes = model.gaussian_conditional.build_indexes(model.h_s(z_hat))
                float_indexes[seed] = _digest(indexes)
    print(json.dumps(symbols if args.job == "encode"
                     else {"symbols": symbols, "float_indexes": float_indexes}))


if __name__ == "__main__":
    _main()
