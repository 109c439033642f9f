"""Checkpoints of others: wrappers, objects beside the weights, hostile sizes, malformed entries."""

import argparse
import copy
import io
import zipfile
from pathlib import PosixPath
from unittest.mock import Mock

from common import UserError
from common.coding import bitstream, checkpoint_file
from common.coding.model_file import coding_state, load_checkpoint, load_model, save_checkpoint
from common.coding.names import plain_name

import numpy as np
import pytest
import torch
from torch import nn

from hyperprior.model import Hyperprior


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Hyperprior(4, 6)
    model.update()
    return model.eval()


def refused(path, state, words):
    torch.save(state, path)
    with pytest.raises(UserError, match=words) as caught:
        load_model(path, Hyperprior)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_what_is_no_damage_is_not_called_damage(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"Is a directory$"):
        checkpoint_file.read(tmp_path)
    path = tmp_path / "a.pth"
    torch.save({}, path)
    for error, words in ((PermissionError(13, "Permission denied"), "Permission denied$"),
                         (OSError(5, "Input/output error"), "Input/output error$"),
                         (MemoryError(), "not enough memory"),
                         (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to "
                                       "allocate 9 bytes"), "not enough memory")):
        monkeypatch.setattr(checkpoint_file, "_outline_of_zip", Mock(side_effect=error))
        with pytest.raises(UserError, match=words) as caught:
            checkpoint_file.read(path)
        assert str(caught.value).startswith(f"{path}: ") and "damaged" not in str(caught.value)


# --------------------------------------------------------------------------------- names of weights
@pytest.mark.parametrize("wrapped", [
    "_orig_mod.module.{}", "module.module.{}", "net.{}", "model.{}", "model.net._orig_mod.{}",
    "module._orig_mod.net.module.{}"])
def test_wrappers_are_dropped_in_any_order_and_depth(wrapped, model, tmp_path):
    state = {wrapped.format(k): v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth", Hyperprior)
    assert bitstream.fingerprint(loaded) == bitstream.fingerprint(model)


def test_a_compiled_part_and_averaged_weights_keep_their_names(model, tmp_path):
    part = copy.deepcopy(model)
    part.g_a = nn.Sequential()
    state = {k.replace("g_a.", "g_a._orig_mod.").replace("g_s.", "g_s._orig_mod.module."): v
             for k, v in model.state_dict().items()} | {"n_averaged": torch.tensor(3)}
    assert set(map(plain_name, state)) == {*model.state_dict(), "n_averaged"}
    torch.save(state, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth")["model"].keys() == model.state_dict().keys()


def test_weights_that_are_there_twice_are_refused(model, tmp_path):
    state = model.state_dict()
    refused(tmp_path / "a.pth", state | {f"module.{k}": v for k, v in state.items()}, "twice, once")


def zoo_spelling(key):
    for name in ("matrices", "biases", "factors"):
        key = key.replace(f"bottleneck.{name}.", f"bottleneck._{name}.")
    return key


def test_spelling_of_the_zoo_loads(model):
    state = {zoo_spelling(k): v for k, v in model.state_dict().items()}
    assert {"entropy_bottleneck._matrices.0", "entropy_bottleneck._biases.4",
            "entropy_bottleneck._factors.3"} <= state.keys()
    loaded = Hyperprior.from_state_dict(state)
    assert bitstream.fingerprint(loaded) == bitstream.fingerprint(model)


# ------------------------------------------------------------------------- tables that are missing
def test_a_state_dict_without_tables_gets_new_ones(model, tmp_path):
    tables = ("_quantized_cdf", "_offset", "_cdf_length")
    bare = {k: v for k, v in model.state_dict().items() if not k.endswith((*tables, "scale_table"))}
    torch.save(bare, tmp_path / "bare.pth")
    loaded = load_model(tmp_path / "bare.pth", Hyperprior)
    assert bitstream.fingerprint(loaded) == bitstream.fingerprint(model)
    coarse = {**bare, "gaussian_conditional.scale_table": torch.tensor([0.5, 1.0, 2.0])}
    torch.save(coarse, tmp_path / "coarse.pth")
    loaded = load_model(tmp_path / "coarse.pth", Hyperprior)
    assert len(loaded.gaussian_conditional.quantized_cdf) == 3  # for the scales that are there
    part = {k: v for k, v in model.state_dict().items() if k != "entropy_bottleneck._offset"}
    refused(tmp_path / "part.pth", part, "entropy_bottleneck._offset")


# --------------------------------------------------------------------- objects beside the weights
def test_numbers_of_numpy_and_a_namespace_are_read(model, tmp_path):
    torch.save({"state_dict": model.state_dict(), "loss": np.float64(0.25), "n": np.int32(-7),
                "big": np.dtype(">f4").type(2), "args": argparse.Namespace(
                    lr=np.float32(0.5), out=PosixPath("a/b")), "config": argparse.Namespace(N=4)},
               tmp_path / "a.pth")
    state = load_checkpoint(tmp_path / "a.pth")
    assert (state["loss"], state["n"], state["big"], state["args"].lr) == (0.25, -7, 2, 0.5)
    assert str(state["args"].out) == "a/b" and state["config"] == {"N": 4}


@pytest.mark.parametrize("legacy", [False, True])
def test_the_entry_with_code_is_named(legacy, model, tmp_path):
    state = {"state_dict": model.state_dict(), "hooks": {"after": [1, print]}}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"its entry hooks.after\[1\] holds a builtins.print"):
        load_checkpoint(tmp_path / "a.pth")


def test_the_older_format_is_read(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    loaded = load_model(tmp_path / "a.pth", Hyperprior)
    assert bitstream.fingerprint(loaded) == bitstream.fingerprint(model)


# -------------------------------------------------------------------------------------------- sizes
def test_sizes_are_checked_before_values_are_read(model, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append(args))
    plain, path = io.BytesIO(), tmp_path / "a.pth"
    monkeypatch.setattr(checkpoint_file, "INFLATED", 2**20)
    torch.save({"w": torch.zeros(1_000_000)}, plain)  # deflated, 4 MB become 4 kB
    with zipfile.ZipFile(plain) as parts, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for name in parts.namelist():
            small.writestr(name, parts.read(name), zipfile.ZIP_DEFLATED, 1)
    expanded = torch.zeros(1).expand(2**31)  # four bytes that become 8 GB
    for state in (None, {"state_dict": {"w": expanded}}):
        if state:
            torch.save(state, path)
        with pytest.raises(UserError, match="would take"):
            load_checkpoint(path)
    assert not read


@pytest.mark.parametrize("old, new, words", [
    (b"K\x07t", b"K\x09t", "values of a tensor are missing"),  # elements of the storage
    (b"K\x07\x85", b"K\x09\x85", "the tensor w lies outside"),  # size of the tensor
    (b"K\x01\x85", b"K\x09\x85", "the tensor w lies outside")])  # its stride
def test_sizes_that_contradict_each_other(old, new, words, tmp_path):
    plain, path = io.BytesIO(), tmp_path / "a.pth"
    torch.save({"w": torch.zeros(7)}, plain)
    with zipfile.ZipFile(plain) as parts, zipfile.ZipFile(path, "w") as forged:
        for name in parts.namelist():
            content = parts.read(name)
            if name.endswith("data.pkl"):
                assert content.count(old) == 1
                content = content.replace(old, new)
            forged.writestr(name, content)
    with pytest.raises(UserError, match=words):
        checkpoint_file.read(path)


def test_a_model_far_larger_than_its_weights_is_not_built(tmp_path):
    """A width that one small kernel states would make N * N * 25 weights of each of six layers."""
    state = Hyperprior(4, 6).state_dict()
    for width, words in ((3000, "sizes differ"), (20_000, "20000 channels, more than 4096")):
        wide = state | {"g_a.0.weight": torch.zeros(width, 3, 5, 5)}
        refused(tmp_path / "a.pth", wide, words)


# ------------------------------------------------------------------------------- malformed entries
NAN, STEPS = float("nan"), {"g_a.0.weight": torch.ones(4, 1, 1, 1)}


def broken(model):
    """Yield the name of an entry and a checkpoint in which it is malformed."""
    good = {**coding_state(model), "config": {}, "step": 5}

    def weights(key, value):
        return f"model.{key}", good | {"model": good["model"] | {key: value}}

    def fixed(key, value):
        return f"exact.h_s.{key}", good | {"exact": {"h_s": good["exact"]["h_s"] | {key: value}}}

    g_s = good["model"]["g_s.2.weight"].clone()
    g_s[0, 0, 0, 0] = NAN
    table = good["model"]["gaussian_conditional.scale_table"].clone()
    table[3] = NAN
    yield weights("g_s.2.weight", g_s)
    yield weights("gaussian_conditional.scale_table", table)
    yield weights("gaussian_conditional.scale_table", table.nan_to_num(0))
    yield weights("g_s.2.weight", "text")
    yield weights("entropy_bottleneck._offset", torch.ones(4, 2, dtype=torch.int32))
    yield weights("entropy_bottleneck._cdf_length", torch.ones(4))
    yield weights("g_s.2.weight", g_s.nan_to_num().to_sparse())
    yield weights("g_s.2.weight", torch.zeros(3, dtype=torch.complex64))
    for value in (None, [], {"h_s": None}, {}, {"h_s": {}}, {"h_s": torch.zeros(0)},
                  {"h_a": good["exact"]["h_s"]}):
        yield "exact", good | {"exact": value}
    shifts = good["exact"]["h_s"]["shifts"]
    yield fixed("grid_bits", [10**6] * 3)
    yield fixed("grid_bits", [12.0] * 3)
    yield fixed("shifts", [s * 0 + 5000 for s in shifts])
    yield fixed("shifts", [s.float() for s in shifts])
    yield fixed("version", "1")
    for entry, values in (("config", ([], 7, {3: 4}, {"lmbda": "x"})), ("step", (-1, 2.5, "x")),
                          ("epoch", (True, [1])), ("hardware", (3, "x" * 10**5))):
        for value in values:
            yield entry, good | {entry: value}
    kernel = good["model"]["g_a.0.weight"].to(torch.int8)
    eight = good | {"model": good["model"] | {"g_a.0.weight": kernel}}
    for value in (torch.ones(3), torch.ones(4, 1, 1, 2), torch.full((4, 1, 1, 1), NAN), 5):
        yield "int8_steps.g_a.0.weight", eight | {"int8_steps": {"g_a.0.weight": value}}
    yield "int8_steps", eight | {"int8_steps": [1]}


def test_a_malformed_entry_is_named(model, tmp_path):
    model = copy.deepcopy(model)
    model.update(torch.tensor([0.2, 1.0, 3.0, 4.0]), force=True)  # small tables, quickly written
    cases = list(broken(model))
    assert len(cases) > 30
    for entry, state in cases:
        refused(tmp_path / "a.pth", state, f"its entry {entry}")
    save_checkpoint(tmp_path / "a.pth", coding_state(model) | {"config": None, "step": 5})
    assert load_model(tmp_path / "a.pth", Hyperprior).provenance.step == 5


@pytest.mark.parametrize("key", ["g_a.0.weight", "g_a.6.weight", "h_s.0.weight",
                                 "entropy_bottleneck.quantiles", "entropy_bottleneck.matrices.0"])
@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.zeros(0), torch.zeros(2, 0, 5, 5),
                                   torch.zeros(1, 2, 3, 4, 5)])
def test_weights_of_impossible_shapes(key, value, model, tmp_path):
    refused(tmp_path / "a.pth", model.state_dict() | {key: value}, "a.pth")
