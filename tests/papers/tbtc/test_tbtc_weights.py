"""TBTC: weights tell their model, those of the source load, wrong ones are named."""

import re

from common import UserError

import pytest
import torch
from tbtc_cases import parameters, photograph, tiny

from tbtc import train
from tbtc.model import MODELS, ZYC2022, build, load
from tbtc.tcm import TCM, our_name


@pytest.mark.parametrize("name", MODELS)
def test_bare_weights_tell_the_model(name, tmp_path):
    model = build(name, "XS")
    torch.save(model.state_dict(), tmp_path / "a.pt")
    found = load(tmp_path / "a.pt")
    assert found.name == name and found.slices == model.slices and parameters(found) == parameters(
        model)


@pytest.mark.parametrize("options", [{"num_heads": 4}, {"split": "post"},
                                     {"charm_widths": "paper"}])
def test_bare_weights_tell_their_reading(options):
    model = ZYC2022("swint", "charm", (32, 64, 96, 128, 32, 64),
                    **{key.removeprefix("num_"): v for key, v in options.items()})
    found = ZYC2022.from_state_dict(model.state_dict())
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, found)]
    assert shapes[0] == shapes[1]
    assert found.g_a.layers[3].blocks[0].attn.heads == 4
    assert found.g_a.layers[1].blocks[0].attn.heads == options.get("num_heads", 2)


TCM_PARTS = {  # of a Swin block in jmliu206/LIC_TCM, and here
    "ln1": "norm1", "ln2": "norm2", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2",
    "msa.embedding_layer": "attn.qkv", "msa.linear": "attn.proj",
    "msa.relative_position_params": "attn.relative_position_bias_table"}


def test_names_of_tcm():
    keys = build("tcm", "XS").state_dict()
    blocks = ("g_a.1.trans_block", "g_s.8.trans_block", "h_a.2.trans_block",
              "h_mean_s.1.trans_block", "atten_mean.0.0.non_local_block.block_1",
              "atten_scale.4.0.non_local_block.block_2")
    for block in blocks:
        for theirs, ours in TCM_PARTS.items():
            end = "" if theirs.endswith("params") else ".weight"
            assert our_name(f"{block}.{theirs}{end}") == f"{block}.{ours}{end}"
            assert f"{block}.{ours}{end}" in keys
    for key in ("g_a.0.conv1.weight", "g_a.1.conv1_1.weight", "g_a.1.conv_block.conv1.weight",
                "atten_mean.0.0.in_conv.weight", "atten_mean.0.0.conv_a.0.conv.0.weight",
                "cc_mean_transforms.0.4.weight", "lrp_transforms.4.0.weight",
                "h_scale_s.0.igdn.beta", "h_a.3.weight"):
        assert our_name(key) == key and key in keys


def as_in_the_source(model):
    """Swin's `relative_position_index` too; TCM's names, and shapes of its biases."""
    result = {}
    for key, value in model.state_dict().items():
        if not isinstance(model, TCM):
            if key.endswith("relative_position_bias_table"):
                result[key.replace("bias_table", "index")] = torch.zeros(4, 4, dtype=torch.long)
        else:
            if key.endswith("relative_position_bias_table"):
                side = int(len(value) ** 0.5)
                value = value.t().reshape(-1, side, side)
            for theirs, ours in TCM_PARTS.items():
                key = re.sub(rf"(trans_block|block_[12])\.{ours}\b", rf"\1.{theirs}", key)
        result[key] = value
    return result


def moves(key):
    """By how much the averaged weights differ from the others in the test below."""
    return 1.0 if "g_a" in key or "entropy_bottleneck.matrices" in key else 0.0


@pytest.mark.parametrize("name", ["zyc2022-conv-charm", "zyc2022-swint-charm", "tcm"])
def test_checkpoints_of_the_source(name, tmp_path):
    """Lightning's dict with `net.` and `_orig_mod.`, and torch_ema's list of averages."""
    model = tiny(name)
    weights = as_in_the_source(model)
    trained = [k for k in weights if "cdf" not in k and "offset" not in k and "index" not in k
               and not k.endswith(("target", "scale_table", "bound", "pedestal", "length"))]
    shadow = [weights[k] + moves(k) for k in trained]
    torch.save({"state_dict": {f"net._orig_mod.{k}": v for k, v in weights.items()}},
               tmp_path / "plain.ckpt")
    torch.save({"state_dict": weights, "epoch": 3, "ema_state_dict": {
        "decay": 0.999, "num_updates": 7, "shadow_params": shadow, "collected_params": None}},
        tmp_path / "ema.ckpt")
    plain, ema = load(tmp_path / "plain.ckpt"), load(tmp_path / "ema.ckpt")
    for key, value in model.named_parameters():
        assert torch.equal(plain.get_parameter(key), value)
        assert torch.equal(ema.get_parameter(key), value + moves(key))
    tables = ema.entropy_bottleneck._quantized_cdf.clone()
    ema.update(force=True)
    assert torch.equal(tables, ema.entropy_bottleneck._quantized_cdf)  # those of the averages
    fresh = build(name, "XS") if name != "tcm" else TCM(32, 40, 16)
    if name == "tcm":
        train.start_from(fresh, tmp_path / "plain.ckpt")
        assert torch.equal(fresh.g_a[0].conv1.weight, model.g_a[0].conv1.weight)
    else:
        with pytest.raises(UserError, match="do not fit"):  # another size
            train.start_from(fresh, tmp_path / "plain.ckpt")
    torch.save({"state_dict": weights, "ema_state_dict": {"shadow_params": shadow[1:]}},
               tmp_path / "short.ckpt")
    with pytest.raises(UserError, match="do not fit"):
        load(tmp_path / "short.ckpt")


def test_start_from_another_prior(tmp_path, capsys):
    """Conv-Hyperprior starts from the transforms of Conv-ChARM, and not from those of SwinT."""
    charm, conv = build("zyc2022-conv-charm", "XS"), build("zyc2022-conv-hyperprior", "XS")
    swin = build("zyc2022-swint-hyperprior", "XS")
    torch.save(charm.state_dict(), tmp_path / "charm.pt")
    train.start_from(conv, tmp_path / "charm.pt")
    assert "starts from entropy_bottleneck, g_a, g_s, h_a, h_s of" in capsys.readouterr().out
    for key, value in conv.named_parameters():
        assert torch.equal(value, charm.get_parameter(key))
    train.start_from(charm, tmp_path / "charm.pt")
    with pytest.raises(UserError, match="of zyc2022-conv-charm do not fit this zyc2022-swint-hyp"):
        train.start_from(swin, tmp_path / "charm.pt")


def test_a_start_needs_both_transforms(tmp_path):
    """g_a of SwinT has the same shapes with --split post, g_s has not."""
    torch.save(build("zyc2022-swint-charm", "XS").state_dict(), tmp_path / "pre.pt")
    with pytest.raises(UserError, match="do not fit this zyc2022-swint-hyperprior .*--split"):
        train.start_from(build("zyc2022-swint-hyperprior", "XS", split="post"), tmp_path / "pre.pt")


def test_wrong_names_and_weights(tmp_path):
    with pytest.raises(UserError, match="choose from zyc2022-conv-hyperprior"):
        build("zyc2022-vit")
    with pytest.raises(UserError, match="choose a size"):
        build("zyc2022-conv-charm", "3")
    with pytest.raises(UserError, match="heads"):
        ZYC2022("swint", "charm", (40, 32, 32, 32, 32, 32))
    broken = tiny("zyc2022-swint-hyperprior")
    with torch.no_grad():
        broken.h_s.layers[0].blocks[0].attn.relative_position_bias_table[3] = torch.inf
    with pytest.raises(UserError, match="NaN or infinity in attention"):
        broken.compress(photograph())
    with pytest.raises(UserError, match="slices of 32"):
        ZYC2022("conv", "charm", (48, 32))
    weights = tiny("zyc2022-conv-charm").state_dict()
    weights["g_s.0.weight"] = weights["g_s.0.weight"][:, :8]
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(UserError, match="g_s.0.weight"):
        load(tmp_path / "a.pt")
