"""g_a and g_s in bfloat16: the same symbols from a file, nearly the same picture; `--jobs`."""

import json
from pathlib import Path

from common import data
from common.coding.image_file import decode_image, encode_image
from common.coding.precision import of, use_precision

import forks
import pytest
import torch

from hyperprior.model import Hyperprior

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Hyperprior(12, 16)
    with torch.no_grad():
        model.g_a[6].weight.mul_(40)
    model.update(force=True)
    return model.eval()


def test_a_file_holds_the_same_symbols_in_both_precisions(model):
    x, seen = torch.rand(3, 64, 128), []
    hook = model.g_s.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    file, pictures = encode_image(model, x), []
    for precision in ("fp32", "bf16", "fp32"):
        use_precision(model, precision)
        assert of(model) == precision
        pictures.append(decode_image(model, file))
    hook.remove()
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(pictures[0], pictures[2]) and encode_image(model, x) == file
    difference = (pictures[0] - pictures[1]).abs().max()
    assert 0 < difference < 2**-6 and pictures[1].dtype == torch.float32


def test_products_are_bf16_but_for_the_last_layer_and_gdn(model):
    use_precision(model, "bf16")
    types = {}
    hooks = [layer.register_forward_hook(
        lambda _, args, out, name=name: types.__setitem__(name, (args[0].dtype, out.dtype)))
        for name, layer in [*model.g_a.named_children(), ("h_a", model.h_a)]]
    y = model.g_a(torch.rand(1, 3, 64, 64))
    model.h_a(y)
    for hook in hooks:
        hook.remove()
    use_precision(model, "fp32")
    assert types["2"][1] == torch.bfloat16
    assert types["1"] == types["6"] == types["h_a"] == (torch.float32, torch.float32)


def test_unknown_precisions_are_refused(model):
    with pytest.raises(ValueError, match="choose from fp32, bf16"):
        use_precision(model, "fp8")


def test_jobs_share_the_images(tmp_path):
    """The same bytes and pictures from one process and from two, in the order of the images."""
    weights = ROOT / "hyperprior" / "weights" / "small-0.0035.pth"
    generator, points = torch.Generator().manual_seed(0), []
    for name in "abc":
        pixels = torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8)
        data.write_image(pixels, tmp_path / "images" / f"{name}.png")
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        forks.run(ROOT / "hyperprior" / "eval.py", "--dataset_path", tmp_path / "images",
                  "--checkpoint", weights, "--outdir", folder, "--resultdir", folder / "results",
                  "--jobs", jobs, "--threads", 1, "--device", "cpu", cwd=tmp_path)
        found, = folder.glob("hyperprior/*/results.json")
        points.append(json.loads(found.read_text())["per_image"][0])
    assert [row["image"] for row in points[1]] == ["a", "b", "c"]
    for one, two in zip(*points, strict=True):
        kept = {key for key in one if not key.endswith("_time")}
        assert len(kept) > 4 and {k: one[k] for k in kept} == {k: two[k] for k in kept}


def test_jobs_on_a_gpu_are_refused(tmp_path):
    _, error = forks.run(ROOT / "hyperprior" / "eval.py", "--jobs", 2, "--device", "cuda",
                         cwd=tmp_path, status=2)
    assert "--jobs 2: its processes share the CPU" in error
