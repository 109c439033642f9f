"""ConvNeXTIC: every revision and ablation codes; what the contexts see; sizes of files, options."""

from common import UserError, data
from common.coding import exact, image_file
from common.loss import RateDistortionLoss

import pytest
import torch
from convnextic_cases import CASES, lively, rate_of

from convnextic import train
from convnextic.context import SCCTX, anchors, lattices
from convnextic.model import build, load
from convnextic.variants import BASELINE, VARIANTS


@pytest.mark.parametrize("variant, options", CASES)
def test_trains_codes_and_decodes(variant, options, x):
    """Every revision and every ablation; a file decodes to the encoder's reconstruction."""
    model = lively(variant, **options)
    rate = rate_of(model)
    batch = torch.cat([x, x.flip(-1)])
    lmbda = torch.tensor([0.01, 0.03]) if rate else None
    output = model.train()(batch, lmbda)
    bits = sum(-p.log2().sum() for p in output["likelihoods"].values())
    (bits / 128**2 + 100 * (output["x_hat"] - batch).square().mean()).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None]
    assert all(n.endswith("quantiles") for n in still)
    model.eval()
    with torch.no_grad():
        expected = model(x, **rate)["x_hat"].clamp(0, 1)[0]
    file = image_file.encode_image(model, x[0], **rate)
    assert torch.equal(image_file.decode_image(model, file), expected)


@pytest.mark.parametrize("variant, options", CASES)
def test_exact_h_s_is_h_s(variant, options):
    model = lively(variant, **options)
    z_hat = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(1)).mul(3).round()
    with torch.no_grad():
        expected = model.h_s(z_hat)
    found = exact.run(model.h_s, z_hat)
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max() + 1e-3


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(24), "2d"])
def test_exact_layer_norm(norm):
    """Close to the float one, and the same whatever the order of channels."""
    from timm.layers import LayerNorm2d

    torch.manual_seed(0)
    norm = LayerNorm2d(24) if norm == "2d" else norm
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    shape = (2, 24, 5, 6) if isinstance(norm, LayerNorm2d) else (2, 5, 6, 24)
    x = 30 * torch.randn(shape)
    found = exact.run(norm, x)
    assert torch.allclose(found.float(), norm(x).detach(), atol=2e-4)
    order = torch.randperm(24)
    dim = 1 if isinstance(norm, LayerNorm2d) else 3
    with torch.no_grad():
        norm.weight.copy_(norm.weight[order].clone())
        norm.bias.copy_(norm.bias[order].clone())
    assert torch.equal(exact.run(norm, x.index_select(dim, order)), found.index_select(dim, order))


def parameters_of(model, y_hat, params):
    with torch.no_grad():
        _, scales, means = model.context_model(y_hat, params, y_hat)
    return torch.cat([scales, means])


def test_mcm_sees_what_comes_before():
    """A change of y_k leaves the parameters of y_1 to y_k alone, and changes y_(k+1)'s."""
    model = lively("v2_stride2")
    y_hat, params = torch.randn(1, 12, 8, 8).round(), torch.randn(1, 24, 8, 8)
    before = parameters_of(model, y_hat, params)
    masks = lattices(8, 8)
    for k, mask in enumerate(masks):
        changed = (parameters_of(model, y_hat + 3 * mask, params) != before).any(1).any(0)
        assert not any(changed[masks[j]].any() for j in range(k + 1))
        assert k == 3 or changed[masks[k + 1]].all()


def test_scctx_sees_what_comes_before():
    model = lively("v3_scctx")
    y_hat, params = torch.randn(1, 24, 8, 8).round(), torch.randn(1, 48, 8, 8)
    before = parameters_of(model, y_hat, params)
    sizes, anchor = model.context_model.sizes, anchors(8, 8)
    assert sizes == (2, 2, 4, 8, 8) and SCCTX(320).sizes == (16, 16, 32, 64, 192)
    for k, size in enumerate(sizes):
        start = sum(sizes[:k])
        for part in (anchor, ~anchor):
            disturbed = y_hat.clone()
            disturbed[:, start : start + size] += 3 * part
            changed = (parameters_of(model, disturbed, params) != before).any(0)
            assert not changed[:start].any()
            mine = changed[start : start + size].any(0)
            assert not mine[anchor].any()
            assert mine[~anchor].all() if part is anchor else not mine.any()
            assert k == 4 or changed[start + size :].any()


@pytest.mark.parametrize("lambda_input", ["log", "raw"])
def test_scaling_nets_begin_at_one(lambda_input, x):
    """v5 at the start is v3 with the same weights, at every lmbda."""
    fixed, variable = lively("v3_scctx"), lively("v5_vr", lambda_input=lambda_input)
    variable.load_state_dict({**variable.state_dict(), **fixed.state_dict()})
    with torch.no_grad():
        expected = fixed(x)["x_hat"]
        for lmbda in (0.0001, 0.2):
            assert torch.equal(variable(x, lmbda)["x_hat"], expected)
    with pytest.raises(UserError, match="give it a lmbda"):
        variable(x)


def test_variable_rate_loss_weighs_each_sample():

    x, x_hat = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    output = {"x_hat": x_hat, "likelihoods": {"y": torch.full((2, 1, 8, 8), 0.5)}}
    lmbda = torch.tensor([0.001, 0.5])
    losses = RateDistortionLoss(0.1)(output, x, lmbda)
    each = [255**2 * (a - b).square().mean() for a, b in zip(x, x_hat, strict=True)]
    expected = 1 + (0.001 * each[0] + 0.5 * each[1]) / 2
    assert losses["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_drawn_multipliers():
    args = train.flags().parse_args(["--variant", "v5_vr", "--quality_level", "7"])
    train.choose_lmbda(args)
    drawn = torch.cat([train.draw_lmbda(args, step, 8) for step in range(500)])
    values = drawn.unique()
    assert len(values) == 21 and values[0] == pytest.approx(0.013)
    assert values.diff().tolist() == pytest.approx([(0.0932 - 0.013) / 20] * 20, rel=1e-3)


def test_tables_follow_the_weights(x):
    """A forced update after a training step: the source kept its first tables for ever."""
    model = lively("v2_stride2")
    before = model.entropy_bottleneck._quantized_cdf.clone()
    optimizer = torch.optim.SGD(model.entropy_bottleneck.parameters(), lr=1.0)
    (-model.train()(x)["likelihoods"]["z"].log2().mean()).backward()
    optimizer.step()
    model.update(force=True)
    after = model.entropy_bottleneck._quantized_cdf
    assert before.shape != after.shape or not torch.equal(before, after)


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_have_the_estimated_size(variant, x):
    """Within 1 %, of a network whose densities cover its latents."""
    model = lively(variant)
    image = data.to_float(data.read_image(data.KODAK / "kodim23.png"))[None]
    context = model.context_model
    networks = [context.parameters_network] if model.context == "mcm" else (
        context.parameters_networks)
    with torch.no_grad():
        spread = model.analyse(image, **rate_of(model)).std()
        for network, channels in zip(networks, context.sizes, strict=True):
            network[-1].bias[:channels] = 1.5 * spread
        model.h_a[1].down[-1].weight /= 20  # untrained, p(z) covers +-10
    rate = rate_of(model)
    with torch.no_grad():
        likelihoods = model(image, **rate)["likelihoods"].values()
    bits = sum(float(-p.double().log2().sum()) for p in likelihoods)
    strings = [s for s, in model.compress(image, **rate)["strings"]]
    assert abs(8 * sum(map(len, strings)) - bits) < 0.01 * bits + 64 * len(strings)  # their ends


@pytest.mark.parametrize("variant, options", CASES)
def test_bare_weights_tell_their_options(variant, options, x, tmp_path):
    if "decoder_dw" in options:
        pytest.skip("a transposed depthwise convolution has the shape of an ordinary one")
    model = lively(variant, **options)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    found = load(tmp_path / "bare.pt")
    for key in BASELINE:
        if key not in ("drop_path_rate", "layer_scale_init"):  # act in training, at the start
            assert getattr(found, key) == getattr(model, key), key
    with torch.no_grad():
        assert torch.allclose(found(x, **rate_of(model))["x_hat"],
                              model(x, **rate_of(model))["x_hat"], atol=1e-4)


@pytest.mark.parametrize("options, message", [
    ({"variant": "v9"}, "choose from v0_ln"), ({"depths": (1, 2)}, "six positive"),
    ({"kernel_size": 4}, "odd"), ({"dw_groups": 3}, "divisor of 8 and 12"),
    ({"drop_path_rate": 1.0}, "below 1"), ({"stem": "k9"}, "patch4"),
    ({"dpeths": 1}, "no option dpeths")])
def test_impossible_options(options, message):
    with pytest.raises(UserError, match=message):
        build(**{"variant": "v2_stride2", "embed_dim": 8, "latent_dim": 12} | options)
