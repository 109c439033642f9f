"""advDNIC: files of all experiments and sizes, exact parts, scales, checkpoints."""

from common import UserError
from common.coding import entropy, exact, image_file

import pytest
import torch
from advdnic_cases import CONTEXTS, SIZES, photograph, tiny

from advdnic.model import EXPERIMENTS, build, load


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_codes_what_forward_promises(experiment):
    """File within 1 % of the likelihoods, decoded symbols those of the encoder."""
    model = tiny(experiment)
    x = photograph()
    with torch.no_grad():
        output = model(x)
    coded = model.compress(x)
    bits = -sum(p.log2().sum() for p in output["likelihoods"].values())
    size = 8 * sum(len(s) for strings in coded["strings"] for s in strings)
    assert abs(size - bits) < 0.01 * bits + 128
    assert torch.equal(model.decompress(coded["strings"], coded["shape"])["x_hat"],
                       output["x_hat"].clamp(0, 1))
    y = model.g_a(x)
    y_hat, *_ = model._encode(y, entropy.dequantize(model.entropy_bottleneck, model.h_a(y.abs())))
    assert y_hat.unique().numel() > 5


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("size", [(1, 1), *SIZES])
def test_any_size(experiment, size):
    model = tiny(experiment)
    x = photograph(*size)[0]
    x_hat = image_file.decode_image(model, image_file.encode_image(model, x))
    assert x_hat.shape == x.shape
    with torch.no_grad():
        padded = image_file.pad(x[None], 64)
        assert torch.equal(x_hat, image_file.crop(model(padded)["x_hat"], size)[0].clamp(0, 1))


@pytest.mark.parametrize("experiment", CONTEXTS)
def test_a_batch_is_its_images(experiment):
    model = tiny(experiment)
    x = torch.cat([photograph(64, 128), photograph(64, 128).flip(3)])
    both = model.compress(x)
    for i in range(2):
        one = model.compress(x[i : i + 1])
        assert [s[i] for s in both["strings"]] == [s[0] for s in one["strings"]]


@pytest.mark.parametrize("options", [{"stages": 2}, {"resnets": 2}, {"ep_compat": True}])
def test_other_readings_code(options, tmp_path):
    model = tiny("variant3", **options)
    x = photograph(64, 128)[0]
    file = image_file.encode_image(model, x)
    torch.save({"model": model.state_dict(), "config": {
        name: getattr(model, name) for name in model.options}}, tmp_path / "a.pth")
    again = load(tmp_path / "a.pth")
    torch.testing.assert_close(image_file.decode_image(again, file),  # g_s is in floats
                               image_file.decode_image(model, file), atol=1e-5, rtol=0)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_exact_parts_are_close_to_floats(experiment):
    model = tiny(experiment)
    with torch.no_grad():
        y = model.g_a(photograph())
        z_hat = entropy.dequantize(model.entropy_bottleneck, model.h_a(y.abs()))
        y_hat, scales, means, _ = model._encode(y, z_hat)
        expected = model._predict(z_hat, y_hat)
    for found, float_values in zip((scales, means), expected, strict=True):
        assert (found - float_values).abs().max() < 0.03 * (1 + float_values.abs().max())


def test_scales_have_a_floor():
    """Whatever entropy parameters say, no scale below 0.11 is coded with."""
    model = tiny("variant3")
    with torch.no_grad():
        model.entropy_parameters[-1].weight.zero_()
    coded = model.compress(photograph(64, 64))
    assert not coded["scales"].any() and not coded["means"].any()
    assert not exact.scale_indexes(coded["scales"], model.gaussian_conditional.scale_table).any()
    with torch.no_grad():
        found = model(photograph(64, 64))["likelihoods"]["y"]
    zeros = coded["y_hat"] == 0
    assert torch.allclose(found[zeros], torch.erf(torch.tensor(0.5 / 0.11 / 2**0.5)).expand(
        int(zeros.sum())))


def test_scale_table_is_that_of_params():
    model = build("base", 8, scales_min=0.2, scales_max=20.0, scales_levels=10)
    model.update()
    table = model.gaussian_conditional.scale_table
    assert len(table) == 10 and table[0] == pytest.approx(0.2) and table[-1] == pytest.approx(20)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_evaluation_is_without_chance(experiment):
    model, x = tiny(experiment), photograph(64, 64)
    with torch.no_grad():
        assert torch.equal(model(x)["x_hat"], model(x)["x_hat"])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_all_parameters_learn(experiment):
    torch.manual_seed(0)
    model = build(experiment, 128 if experiment == "variant4" else 16).train()
    output = model(torch.rand(2, 3, 64, 64))
    rate = -sum(p.log().mean() for p in output["likelihoods"].values())
    (output["x_hat"].mean() + rate).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None and "quantiles" not in n]
    assert silent == []


def test_context_sees_the_noise_of_the_likelihood():
    """In training y_hat has one noise, for the context and for its own likelihood."""
    model = build("variant3", 8).train()
    seen = []
    model.context_model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.gaussian_conditional._likelihood = (
        lambda y_hat, *_: seen.append(y_hat) or torch.ones_like(y_hat))
    model(torch.rand(1, 3, 64, 64))
    assert len(seen) == 2 and torch.equal(*seen)


def test_checkpoint_of_another_experiment(tmp_path):
    model = tiny("base")
    torch.save({"model": model.state_dict(), "config": {"experiment": "mod4"}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="not the weights"):
        load(tmp_path / "a.pth")
    torch.save(model.state_dict(), tmp_path / "b.pth")
    with pytest.raises(UserError, match="do not tell their experiment"):
        load(tmp_path / "b.pth")
