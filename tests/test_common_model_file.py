"""Weights files: old, damaged and foreign ones, tables and exponents in them, export."""

import re
import subprocess

from common import UserError
from common.coding import exact
from common.coding.model_file import coding_state, load_checkpoint, load_model, save_checkpoint
from common.recipes import export

import pytest
import torch

from factorized.model import Factorized
from hyperprior.model import Hyperprior
from hyperprior.model import load as load_hyperprior


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut zip"])
def test_unreadable_checkpoint_is_named(content, tmp_path):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(UserError, match="bad.pth"):
        load_checkpoint(tmp_path / "bad.pth")


def test_cut_checkpoint_folder_and_other_objects_are_named(tmp_path):
    path = tmp_path / "bad.pth"
    save_checkpoint(path, {"model": Factorized(4, 6).state_dict()})
    content = path.read_bytes()
    for part in (0.1, 0.9, 0.999):
        path.write_bytes(content[: int(part * len(content))])
        with pytest.raises(UserError, match="bad.pth"):
            load_checkpoint(path)
    for other in ([1, 2], {}, {"model": 3}, {"state": {}, "param_groups": []},
                  {0: torch.zeros(1)}, torch.zeros(2)):
        torch.save(other, path)
        with pytest.raises(UserError, match="bad.pth: holds no state dict"):
            load_checkpoint(path)
    for missing in (tmp_path, tmp_path / "absent.pth"):
        with pytest.raises(UserError, match=missing.name):
            load_checkpoint(missing)


def test_old_spelling_of_compressai_loads(tmp_path):
    """Its first releases kept the densities as _matrix0, _bias0, _factor0."""
    model = Hyperprior(4, 6)
    model.update()
    state = {re.sub(r"\.(matri|biase|factor)(?:ces|x|s)\.(\d)$", lambda m: "._" + {
        "matri": "matrix", "biase": "bias", "factor": "factor"}[m[1]] + m[2], k): v
        for k, v in model.state_dict().items()}
    assert "entropy_bottleneck._matrix0" in state and len(state) == len(model.state_dict())
    torch.save(state, tmp_path / "old.pth")
    loaded = load_hyperprior(tmp_path / "old.pth").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_checkpoint_with_code_in_it_is_refused(tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}, "hook": subprocess.run}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="bad.pth"):
        load_checkpoint(tmp_path / "bad.pth")


def test_prefixes_of_wrappers_are_dropped(tmp_path):
    state = Factorized(4, 6).state_dict()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        torch.save({"state_dict": {prefix + k: v for k, v in state.items()}}, tmp_path / "a.pth")
        assert load_checkpoint(tmp_path / "a.pth")["model"].keys() == state.keys()


def test_loading_is_strict_and_names_the_weights(tmp_path):
    state = Factorized(4, 6).state_dict()
    torch.save({k: v for k, v in state.items() if k != "g_s.2.bias"}, tmp_path / "less.pth")
    torch.save({**state, "extra.weight": torch.zeros(1)}, tmp_path / "more.pth")
    torch.save(Hyperprior(4, 6).state_dict(), tmp_path / "other.pth")
    for name, key in (("less", "g_s.2.bias"), ("more", "extra.weight"), ("other", "h_a.0.weight")):
        with pytest.raises(UserError, match=key):
            load_model(tmp_path / f"{name}.pth", Factorized)


def test_tables_come_from_the_checkpoint(tmp_path):
    """Never rebuilt on load: an altered table stays altered, altered exponents too."""
    torch.manual_seed(0)
    model = Hyperprior(4, 6)
    model.update()
    state = coding_state(model)
    state["model"]["entropy_bottleneck._quantized_cdf"][0, 1] += 1
    state["exact"]["h_s"]["shifts"][0] -= 3
    save_checkpoint(tmp_path / "a.pth", state)
    loaded = load_hyperprior(tmp_path / "a.pth")
    table = loaded.entropy_bottleneck._quantized_cdf
    assert torch.equal(table, state["model"]["entropy_bottleneck._quantized_cdf"])
    assert torch.equal(exact.spec(loaded.h_s)["shifts"][0], state["exact"]["h_s"]["shifts"][0])


@pytest.mark.parametrize("small_kernel", [0, 2000, 10**9])  # all in 8 bits, some, none
def test_export_is_the_model_in_the_file(small_kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SMALL_KERNEL", small_kernel)
    torch.manual_seed(0)
    model = Hyperprior(8, 12).eval()
    model.update()
    export.write(tmp_path / "a.pth", model, config={"lmbda": 0.013}, step=5)
    loaded = load_hyperprior(tmp_path / "a.pth")
    assert (loaded.provenance.config["lmbda"], loaded.provenance.step) == (0.013, 5)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    x = torch.rand(1, 3, 64, 64)
    assert loaded.compress(x)["strings"] == model.compress(x)["strings"]
    table = model.entropy_bottleneck._quantized_cdf.clone()
    table[0, 1] += 1  # of older weights, say: what the file holds is what its streams were coded by
    model.entropy_bottleneck._quantized_cdf.copy_(table)
    export.write(tmp_path / "b.pth", model)
    assert torch.equal(
        load_hyperprior(tmp_path / "b.pth").entropy_bottleneck._quantized_cdf, table)
    plain = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    assert (tmp_path / "a.pth").stat().st_size < plain / 2


@pytest.mark.parametrize("out", [0, 1])
def test_eight_bit_kernels_are_close(out):
    weight = torch.randn(64, 48, 5, 5, generator=torch.Generator().manual_seed(0))
    weight.select(out, 0).zero_()  # a dead channel stays zero
    weight.select(out, 1).mul_(1e-3)  # and a faint one has a step of its own
    q, step = export._to_int8(weight, out)
    assert q.dtype == torch.int8 and step.numel() == weight.size(out)
    assert q.select(out, 0).abs().max() == 0
    error = (q * step - weight).transpose(0, out).flatten(1).square().mean(1)[1:]
    power = weight.transpose(0, out).flatten(1).square().mean(1)[1:]
    assert (10 * torch.log10(power / error)).min() > 38  # dB, each channel


def test_a_damaged_checkpoint_is_not_loaded(tmp_path):
    """torch.load reads past the checksums of the zip file that a checkpoint is."""
    path = tmp_path / "a.pth"
    export.write(path, Hyperprior(8, 12).eval())
    whole = path.read_bytes()
    for position in range(300, len(whole) - 300, len(whole) // 40):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(bytes(damaged))
        try:
            state = load_checkpoint(path)["model"]
        except UserError:
            continue
        path.write_bytes(whole)  # a flip that changed no content, as in a time stamp
        good = load_checkpoint(path)["model"]
        assert all(torch.equal(v, good[k]) for k, v in state.items())


@pytest.mark.parametrize("content, words", [
    (b"# a text\n", "give one of train.py"), (b"PK\3\4", "give one of train.py|damaged"),
    (b"", "can be read, it is damaged")])
def test_what_is_no_checkpoint(content, words, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_checkpoint(tmp_path / "a.pth")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_kernels_without_steps_are_refused(tmp_path):
    torch.save({"model": {"a": torch.ones(2, dtype=torch.int8)}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="8-bit kernels are missing"):
        load_checkpoint(tmp_path / "a.pth")
