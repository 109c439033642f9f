"""Coded files of earlier versions decode to the same latents.

tests/golden/ holds tiny networks with random weights and files that were coded with them. The
latents y_hat come from fixed-point arithmetic and must be the same to the bit on every machine. The
decoded image comes from floating-point arithmetic and may differ by one 8-bit level. A test that
fails here says that files of users no longer decode: the files in tests/golden/ are not to be made
anew. tests/golden/make.py tells how they were made.
"""

import hashlib
import importlib
import json
from pathlib import Path

from common import data
from common.coding import image_file

import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
STRIDE = 4  # the reference image of a decoded image holds every fourth pixel, from the second on
CASES = {f"{path.stem}-{mode}": (record["paper"], GOLDEN / record["weights"], entry)
         for path in sorted(GOLDEN.glob("*.json")) for record in [json.loads(path.read_text())]
         for mode, entry in record["files"].items()}


# -------------------------------------------------------------- what is used of the project's API
def decode_latents(paper: str, weights: Path, coded: Path) -> list[Tensor]:
    """y_hat (B, M, h, w) as g_s gets it, once for each patch that was coded on its own."""
    module, codec = (importlib.import_module(f"{paper}.{name}") for name in ("model", "codec"))
    model, latents = module.load(weights), []
    if paper == "convnextic":  # calls g_s stage by stage, with a gain before each
        synthesize = model.synthesize
        model.synthesize = lambda y_hat, *rate: (latents.append(y_hat), synthesize(y_hat, *rate))[1]
        codec.decode(model, coded.read_bytes())
    else:
        model.g_s.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0]))
        image_file.decode_image(model, coded.read_bytes())
    return latents


def decode_image(paper: str, weights: Path, coded: Path, output: Path) -> Tensor:
    """uint8 (3, H, W), by the command line `python codec.py decode`."""
    importlib.import_module(f"{paper}.codec").main(
        ["decode", str(coded), "-o", str(output), "--checkpoint", str(weights), "--device", "cpu"])
    return data.read_image(output)


# ------------------------------------------------------------------------------------------ tests
def digest_of(latents: list[Tensor]) -> str:
    """SHA-256 of the shapes and of the values as little-endian float32; -0 counts as 0."""
    digest = hashlib.sha256()
    for y_hat in latents:
        values = (y_hat.detach().float() + 0.0).cpu().contiguous().numpy().astype("<f4")
        digest.update(f"{tuple(y_hat.shape)}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def subsample(image: Tensor) -> Tensor:
    return image[:, 1::STRIDE, 1::STRIDE]


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][2]["y_hat"]])
def test_latents_are_the_same_to_the_bit(case):
    """ConvNeXTIC's second file format, which only the command line decodes, has no record of them.
    """
    paper, weights, entry = CASES[case]
    assert digest_of(decode_latents(paper, weights, GOLDEN / entry["coded"])) == entry["y_hat"]


@pytest.mark.parametrize("case", CASES)
def test_decoded_image_differs_by_one_level_at_most(case, tmp_path):
    paper, weights, entry = CASES[case]
    image = decode_image(paper, weights, GOLDEN / entry["coded"], tmp_path / "decoded.png")
    expected = data.read_image(GOLDEN / entry["x_hat"])
    assert list(image.shape) == entry["shape"]
    assert (subsample(image).int() - expected.int()).abs().max() <= 1


def test_every_file_of_the_folder_is_tested():
    used = {GOLDEN / "image.png", GOLDEN / "make.py"} | set(GOLDEN.glob("*.json"))
    for _, weights, entry in CASES.values():
        used |= {weights, GOLDEN / entry["coded"], GOLDEN / entry["x_hat"]}
    assert used == {path for path in GOLDEN.iterdir() if path.is_file()}
    assert sum(path.stat().st_size for path in used) < 2**20


def test_digest_tells_latents_apart():
    y_hat = torch.arange(8.0).view(1, 2, 2, 2)
    assert digest_of([y_hat]) == digest_of([y_hat.to(memory_format=torch.channels_last).double()])
    assert digest_of([y_hat]) != digest_of([y_hat.flip(0, 1)])
    assert digest_of([0 * y_hat]) == digest_of([-0.0 * y_hat])
