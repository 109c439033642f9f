"""A file written by one process decodes in others, whatever their threads, layout and instructions.

The same settings make the float path disagree with itself: that is why h_s is exact.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

from common.papers import papers

import forks
import pytest
from networks import NETWORKS, lively

ROOT = Path(__file__).parents[1]
SETTINGS = {  # name: threads, oneDNN, channels_last; the first one is the encoder's
    "2 threads": (2, True, True),
    "1 thread": (1, True, True),
    "oneDNN off": (2, False, True),
    "contiguous": (2, True, False),
}
INSTRUCTIONS = {  # name: what the libraries read before they compute anything
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
             "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "no vector instructions": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default",
                               "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
BUNDLED = {  # one of each architecture: small-0.0035.pth and small-0.013.pth have the same layers
    re.sub(r"[\d.]+", "", f"{paper}-{path.stem}"): (paper, path) for paper in papers()
    for path in sorted((ROOT / paper / "weights").glob("*.pth"))}
NAMES = [*BUNDLED, *NETWORKS]


def work(*arguments, libraries=None):
    output, _ = forks.run(__file__, *arguments, cwd=ROOT, libraries=libraries)
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return folder, work("encode", folder, "2 threads")["2 threads"]


@pytest.fixture(scope="module")
def decoded(encoded):
    folder, _ = encoded
    found = work("decode", folder, *SETTINGS)
    for name, libraries in INSTRUCTIONS.items():
        found[name] = work("decode", folder, "2 threads", libraries=libraries)["2 threads"]
    return found


@pytest.mark.parametrize("setting", [*SETTINGS, *INSTRUCTIONS])
def test_every_setting_decodes_the_encoder_s_symbols(setting, encoded, decoded):
    assert {file.rpartition("-")[0] for file in encoded[1]["y_hat"]} == set(NAMES)
    assert decoded[setting]["y_hat"] == encoded[1]["y_hat"]


@pytest.mark.parametrize("setting", [*SETTINGS, *INSTRUCTIONS])
def test_exact_layers_are_equal_to_the_last_bit(setting, decoded):
    """Scales and means as float64, before these become indexes and grid points."""
    assert decoded[setting]["exact"] == decoded["2 threads"]["exact"]


def test_float_path_differs_between_settings(decoded):
    """Scales of the float h_s cross a table boundary somewhere, and one crossing ruins a stream."""
    assert len({result["float_indexes"] for result in decoded.values()}) > 1


# ----------------------------------------------------- what runs in the other processes
class Decoded(Exception):
    """Raised instead of g_s, which is not needed: its input is y_hat."""


def _choose(setting):
    """Apply a setting to this process; return its memory layout."""
    import torch

    threads, torch.backends.mkldnn.enabled, channels_last = SETTINGS[setting]
    torch.set_num_threads(threads)
    return torch.channels_last if channels_last else torch.contiguous_format


def _load(job, folder, name):
    """A network and its paper; encoding writes those of random weights first."""
    import importlib

    import torch

    if name in BUNDLED:
        paper, path = BUNDLED[name]
    else:
        paper, path = NETWORKS[name][0], folder / f"{name}.pth"
        if job == "encode":
            side = 128 if paper == "convnextic" else 64  # kernels without padding
            model = lively(name, _image()[None, :, :side, :side])
            torch.save({"model": model.state_dict(), "config": NETWORKS[name][1]}, path)
    return paper, importlib.import_module(f"{paper}.model").load(path)


def _image():
    """(3, 256, 384)"""
    from common import data

    return data.to_float(data.read_image(data.KODAK / "kodim08.png"))[:, 128:384, 192:576]


def _decode(model, file):
    """Digests of y_hat, and of all that exact layers return on the way to it."""
    from common.coding import exact, image_file

    digest, run = hashlib.sha256(), exact.run

    def recorded(layers, x):
        y = run(layers, x)
        digest.update(y.numpy().tobytes())
        return y

    exact.run = recorded
    try:
        image_file.decode_image(model, file)
    except Decoded as stop:
        y_hat, = stop.args
    exact.run = run
    assert y_hat.unique().numel() > 2
    return _digest(y_hat), digest.hexdigest()


def _rates(paper, model):
    """Two operating points of a model of variable rate."""
    if paper == "qvrf":
        return {"s": 5}, {"factor": 3.7}
    return ({"lmbda": 0.001}, {"lmbda": 0.01}) if getattr(model, "variable_rate", False) else ({},)


def _digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def _float_indexes(layout):
    """Indexes of CDF tables by the float h_s of hyperprior, for the same z_hat in all settings."""
    from common.coding import entropy

    import torch

    from hyperprior.model import load

    model = load(BUNDLED["hyperprior-small-"][1]).to(memory_format=layout)
    generator = torch.Generator().manual_seed(0)  # integers: randn differs between instructions
    z = torch.randint(-8, 9, (2, model.N, 32, 48), generator=generator).float()
    z_hat = entropy.dequantize(model.entropy_bottleneck, z).contiguous(memory_format=layout)
    boundaries = model.gaussian_conditional.scale_table[:-1]
    with torch.no_grad():
        return _digest(torch.bucketize(model.h_s(z_hat), boundaries))


def _main(job, folder, *settings):
    from common.coding import image_file

    def synthesis(y_hat, *_):
        raise Decoded(y_hat)

    found = {name: {"y_hat": {}, "exact": {}} for name in settings}
    for name in NAMES:
        paper, model = _load(job, Path(folder), name)
        if paper == "convnextic":  # its g_s is called stage by stage
            model.synthesize = synthesis
        else:
            model.g_s.register_forward_pre_hook(lambda _, inputs: synthesis(*inputs))
        x = _image()[:, :184, :248] if name in BUNDLED else _image()[:, :88, :136]
        for setting in settings:
            model.to(memory_format=_choose(setting))
            for i, rate in enumerate(_rates(paper, model)):
                path = Path(folder, f"{name}-{i}.bin")
                if job == "encode":
                    path.write_bytes(image_file.encode_image(model, x, **rate))
                digests = _decode(model, path.read_bytes())
                found[setting]["y_hat"][path.stem], found[setting]["exact"][path.stem] = digests
    for setting in settings if job == "decode" else ():
        found[setting]["float_indexes"] = _float_indexes(_choose(setting))
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
