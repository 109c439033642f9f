"""Context models: forward against files and CompressAI, variants, weights of one for the other."""

from common.coding import bitstream, entropy
from common.coding.model_file import coding_state, save_checkpoint
from common.training.checkpoints import load_weights

import pytest
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.latent_codecs import CheckerboardLatentCodec, GaussianConditionalLatentCodec
from compressai.layers import GDN1
from context_cases import MODELS, PAPERS, build, latents, lively

from checkerboard.model import Checkerboard, anchors
from joint_ar.model import JointAutoregressive


# -------------------------------------------------------------------------------------- forward
def test_one_pass_gives_the_parameters_of_two():
    """On the same y_hat, entropy_parameters once on a masked context, or once for each colour."""
    for parity in ("even", "odd"):
        model = build("checkerboard", anchor_parity=parity)
        y, params = latents(model, 8, 8)
        params, colour = params.float(), anchors(8, 8, parity)
        with torch.no_grad():
            once = model._predict(params, model.context_prediction(y) * ~colour)
            first = model._predict(params, torch.zeros_like(params))
            second = model._predict(params, model.context_prediction(y * colour))
        for a, b, c in zip(once, first, second, strict=True):
            assert torch.allclose(a, torch.where(colour, b, c), atol=1e-5)


@pytest.mark.parametrize("parity", ["even", "odd"])
def test_two_pass_training_is_compressai_s(parity, monkeypatch):
    model = build("checkerboard", anchor_parity=parity, ckbd_forward="twopass")
    y, params = latents(model, 8, 12)
    params = params.float()
    merge = type("Merge", (torch.nn.Module,), {  # CompressAI's order is context, hyper parameters
        "forward": lambda self, x: model.entropy_parameters(x.roll(2 * model.M, 1))})()
    codec = CheckerboardLatentCodec(
        latent_codec={"y": GaussianConditionalLatentCodec(quantizer="ste")},
        entropy_parameters=merge, context_prediction=model.context_prediction,
        anchor_parity=parity, forward_method="twopass").eval()
    monkeypatch.setattr(model, "g_a", torch.nn.Identity())
    monkeypatch.setattr(model.h_s, "forward", lambda _: params)
    seen = []
    model.g_s.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.train()
    model.gaussian_conditional.eval()  # no noise
    with torch.no_grad():
        ours, theirs = model(y)["likelihoods"]["y"], codec(y, params)
    assert torch.allclose(ours, theirs["likelihoods"]["y"], atol=1e-5)
    assert torch.allclose(seen[0], theirs["y_hat"], atol=1e-5)


@pytest.mark.parametrize("paper", PAPERS)
def test_forward_is_what_a_file_gives(paper):
    """One quantiser for forward, compress and decompress: the same bits enter g_s."""
    model = build(paper)
    x = torch.rand(2, 3, 128, 192)
    result, seen = model.compress(x), []
    model.g_s.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
    model.decompress(result["strings"], result["shape"])
    assert torch.equal(*seen)


def test_rounded_forward_is_compressai_s():
    torch.manual_seed(3)
    model = MODELS["joint_ar"].build(8, 12, quantize="rounded")
    baseline = MODELS["joint_ar"].BASELINE(8, 12).eval()
    baseline.load_state_dict(lively(model).state_dict())
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        ours, theirs = model(x), baseline(x)
    assert torch.allclose(ours["x_hat"], theirs["x_hat"], atol=1e-5)
    assert torch.allclose(ours["likelihoods"]["y"], theirs["likelihoods"]["y"], atol=1e-5)


def test_training_context_has_no_gradient_through_masked_weights():
    for model in (JointAutoregressive(4, 6), Checkerboard(4, 6)):
        model.train()
        model(torch.rand(1, 3, 64, 64))["likelihoods"]["y"].log().sum().backward()
        layer = model.context_prediction
        assert (layer.weight.grad[layer.mask == 0] == 0).all()
        assert (layer.weight.grad[layer.mask == 1] != 0).any()


# --------------------------------------------------------------------------- variants, warm start
def test_seminar_mixes_gdn1():
    model = MODELS["joint_ar"].build(4, 6, gdn_variant="seminar")
    kinds = [type(layer) is GDN1 for part in (model.g_a, model.g_s) for layer in part[1::2]]
    assert kinds == [True, False, False, True, True, True]
    other = MODELS["joint_ar"].build(4, 6)
    other.load_state_dict(model.state_dict())  # the weights do not tell the two apart
    x = torch.rand(1, 3, 64, 64)
    assert not torch.allclose(model.eval().g_a(x), other.eval().g_a(x))
    layer = GDN1(4)
    assert layer(torch.full((1, 4, 1, 1), 2.0)).flatten().tolist() == pytest.approx(
        [1.666667] * 4, abs=1e-5)
    layer.inverse = True
    assert layer(torch.full((1, 4, 1, 1), 2.0)).flatten().tolist() == pytest.approx([2.4] * 4,
                                                                                   abs=1e-5)


def test_checkerboard_starts_from_joint_ar():
    source, model = build("joint_ar"), build("checkerboard")
    keys = list(model.state_dict())
    assert keys == list(source.state_dict())
    mask = model.context_prediction.mask.clone()
    model.load_state_dict(source.state_dict())
    assert torch.equal(model.context_prediction.mask, mask)
    both = source.context_prediction.mask * mask
    live = model.context_prediction.weight * mask
    assert torch.equal(live, source.context_prediction.weight * both)
    assert int(both[0, 0].sum()) == 6
    for name in ("g_a.0.weight", "entropy_parameters.4.bias", "h_s.2.weight"):
        assert torch.equal(model.state_dict()[name], source.state_dict()[name])


@pytest.mark.parametrize("paper, option, value", [
    ("joint_ar", "gdn_variant", "seminar"), ("checkerboard", "anchor_parity", "odd")])
def test_checkpoint_remembers_what_its_weights_do_not_tell(paper, option, value, tmp_path):
    from common.recipes import export

    model = build(paper, **{option: value})
    export.write(tmp_path / "a.pth", model, config={option: value, "lmbda": 0.01})
    loaded = MODELS[paper].load(tmp_path / "a.pth")
    assert getattr(loaded, option) == value
    x = torch.rand(1, 3, 64, 128)
    assert loaded.compress(x)["strings"] == model.compress(x)["strings"]


@pytest.mark.parametrize("paper", PAPERS)
def test_model_in_memory_is_that_of_its_checkpoint(paper, tmp_path):
    """Dead taps too: a file coded during training decodes with the checkpoint saved then."""

    torch.manual_seed(0)
    model = MODELS[paper].build(8, 12)
    model.update(force=True)
    save_checkpoint(tmp_path / "a.pth", coding_state(model))
    assert bitstream.fingerprint(MODELS[paper].load(tmp_path / "a.pth")) == bitstream.fingerprint(
        model)


@pytest.mark.parametrize("paper, option, value", [
    ("joint_ar", "gdn_variant", "seminar"), ("checkerboard", "anchor_parity", "odd")])
def test_fingerprint_tells_variants_of_equal_weights_apart(paper, option, value):

    model = build(paper)
    before = bitstream.fingerprint(model)
    setattr(model, option, value)
    assert bitstream.fingerprint(model) != before


@pytest.mark.parametrize("paper, other", [PAPERS, PAPERS[::-1]])
def test_weights_of_the_other_mask_are_refused(paper, other, tmp_path):
    from common import UserError
    from common.recipes import export

    export.write(tmp_path / "a.pth", build(other))
    with pytest.raises(UserError, match="a.pth: not .*context_prediction.mask"):
        MODELS[paper].load(tmp_path / "a.pth")
    if paper == "joint_ar":
        with pytest.raises(UserError, match="a.pth: not .*context_prediction.mask"):
            load_weights(build(paper), tmp_path / "a.pth")


def test_bottlenecks_are_compressai_s():
    for paper in PAPERS:
        model = MODELS[paper].build(8, 12)
        assert isinstance(model.entropy_bottleneck, EntropyBottleneck)
        assert type(model.gaussian_conditional) is GaussianConditional


@pytest.mark.parametrize("training", [True, False])
def test_our_bottleneck_gives_compressai_s_numbers(training):
    """z_hat, likelihoods and gradients, bit for bit; only the way to them differs."""
    results = []
    for kind in (EntropyBottleneck, entropy.EntropyBottleneck):
        torch.manual_seed(0)
        bottleneck = kind(6).train(training)
        z = (4 * torch.randn(2, 6, 3, 5)).requires_grad_()
        outputs = bottleneck(z)
        sum(output.square().sum() for output in outputs).backward()
        results.append([*outputs, z.grad, *(p.grad for p in bottleneck.parameters()
                                            if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
