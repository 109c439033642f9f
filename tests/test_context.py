"""Context models: what a latent may see, the order of coding, and exact equality of its ways."""

from common.coding import context, entropy, exact, exact_int8

import pytest
import torch
import torch.nn.functional as F
from context_cases import MODELS, PAPERS, build, latents

from checkerboard.model import anchors
from joint_ar.model import JointAutoregressive, wavefront


# ------------------------------------------------------------------------------ masks, causality
@pytest.mark.parametrize("paper, expected", [
    ("joint_ar", ["11111", "11111", "11000", "00000", "00000"]),
    ("checkerboard", ["01010", "10101", "01010", "10101", "01010"])])
def test_mask(paper, expected):
    layer = MODELS[paper].build().context_prediction
    assert (layer.mask.sum(dim=(2, 3)) == 12).all()
    assert int(layer.mask.sum()) == 884_736  # M = 192
    rows = ["".join(str(int(v)) for v in row) for row in layer.mask[5, 7]]
    assert rows == expected


def reachable(paper, height, width):
    """(h*w, h*w) bool: whether the context at a position depends on y_hat elsewhere; gradients."""
    layer = build(paper, N=4, M=2).context_prediction
    y_hat = torch.randn(1, 2, height, width, requires_grad=True)
    output = layer(y_hat)
    rows = []
    for k in range(height * width):
        gradient, = torch.autograd.grad(output.flatten(2)[0, :, k].sum(), y_hat, retain_graph=True)
        rows.append((gradient[0] != 0).any(0).flatten())
    return torch.stack(rows)


def test_gradients_of_the_causal_context_come_from_before():
    depends = reachable("joint_ar", 5, 7)
    assert not depends.triu().any()  # neither itself nor a later one in raster order
    assert depends[2 * 7 + 3].sum() == 12


def test_gradients_of_the_checkerboard_come_from_the_other_colour():
    depends = reachable("checkerboard", 5, 7)
    colour = anchors(5, 7).flatten()
    assert not depends[colour][:, colour].any() and not depends[~colour][:, ~colour].any()
    assert depends[2 * 7 + 3].sum() == 12


@pytest.mark.parametrize("parity", ["even", "odd"])
def test_perturbing_an_anchor_moves_only_others_and_the_reverse_nothing(parity):
    model = build("checkerboard", anchor_parity=parity)
    y, params = latents(model, 6, 8)
    colour = anchors(6, 8, parity)

    def predict(y_hat):
        rule = model._context(params)
        rule.put(torch.arange(48), y_hat.double().flatten(2).transpose(1, 2))
        means = torch.empty(48, model.M, dtype=torch.float64)
        for use_context, blocks in model._passes(params):
            for positions in blocks:
                means[positions] = rule.predict(positions, use_context)[1][0]
        return means

    before = predict(y.round())
    for position in (19, 20):  # neighbours, so one of each colour
        changed = y.round().flatten(2)
        changed[..., position] += 7
        moved = (predict(changed.view_as(y)) != before).any(1)
        if colour.flatten()[position]:
            assert moved.any() and not moved[colour.flatten()].any()
        else:
            assert not moved.any()


def test_perturbing_a_latent_moves_later_waves_only():
    model = build("joint_ar")
    y, params = latents(model, 6, 8)
    _, _, before = model._encode_waves(y, params)
    waves = wavefront(6, 8)
    changed = y.clone().flatten(2)
    changed[..., waves[9]] += 7
    _, _, after = model._encode_waves(changed.view_as(y), params)
    first = sum(map(len, waves[:10])) * 1
    assert torch.equal(before[:, :first], after[:, :first])
    assert not torch.equal(before, after)


# -------------------------------------------------------------------------------- order of coding
@pytest.mark.parametrize("height, width", [(32, 48), (1, 1), (1, 9), (9, 1), (5, 3), (4, 2)])
def test_waves_cover_all_positions_and_read_earlier_ones(height, width):
    waves = wavefront(height, width)
    assert sorted(torch.cat(waves).tolist()) == list(range(height * width))
    if width > 2:
        assert len(waves) == width + 3 * (height - 1)
    wave_of = {p: i for i, wave in enumerate(waves) for p in wave.tolist()}
    for p, i in wave_of.items():
        y, x = divmod(p, width)
        for dy, dx in [(-2, d) for d in range(-2, 3)] + [(-1, d) for d in range(-2, 3)] + [
                (0, -2), (0, -1)]:
            if 0 <= y + dy and 0 <= x + dx < width:
                assert wave_of[p + dy * width + dx] < i


@pytest.mark.parametrize("parity", ["even", "odd"])
def test_passes_halve_the_latents(parity):
    model = build("checkerboard", anchor_parity=parity)
    (first, a), (second, b) = model._passes(torch.empty(1, 1, 8, 12))
    assert (first, second) == (False, True)
    assert len(torch.cat(a)) == len(torch.cat(b)) == 8 * 12 // 2
    assert sorted(torch.cat(a + b).tolist()) == list(range(96))
    assert (0 in torch.cat(a)) == (parity == "even")


@pytest.mark.parametrize("parity", ["even", "odd"])
def test_each_pass_codes_half_of_the_symbols(parity, monkeypatch):
    model, coded = build("checkerboard", anchor_parity=parity), []
    encode = entropy.encode
    monkeypatch.setattr(entropy, "encode", lambda symbols, *rest: coded.append(
        symbols.numel()) or encode(symbols, *rest))
    model.compress(torch.rand(1, 3, 128, 192))
    assert coded[1:] == [model.M * 8 * 12 // 2] * 2  # coded[0]: z


# ------------------------------------------------------------------------------- equal ways to code
def raster(model, y, params):
    """The oracle: pixel by pixel, whole exact layers on 5x5 windows. y_hat, symbols by position."""
    height, width = y.shape[-2:]
    y_hat = F.pad(torch.zeros_like(y, dtype=torch.float64), (2, 2, 2, 2))
    symbols = torch.zeros(height * width, model.M, dtype=torch.int32)
    indexes = torch.zeros(height * width, model.M, dtype=torch.int32)
    for row in range(height):
        for column in range(width):
            window = y_hat[:, :, row : row + 5, column : column + 5]
            around = exact.run(model.context_prediction, window)[:, :, 2:3, 2:3]
            here = torch.cat([params[:, :, row : row + 1, column : column + 1], around], 1)
            scales, means = exact.run(model.entropy_parameters, here).chunk(2, 1)
            means = exact.round_to_grid(means, context.MEAN_BITS)
            symbol = torch.round(y[:, :, row : row + 1, column : column + 1].double() - means)
            y_hat[:, :, row + 2, column + 2] = (symbol + means)[:, :, 0, 0]
            symbols[row * width + column] = symbol.flatten().int()
            indexes[row * width + column] = exact.scale_indexes(
                scales, model.gaussian_conditional.scale_table).flatten()
    return y_hat[:, :, 2:-2, 2:-2].float(), symbols, indexes


@pytest.mark.parametrize("height, width", [(8, 12), (3, 5), (1, 4), (4, 1)])
def test_waves_equal_the_raster_oracle(height, width):
    model = build("joint_ar")
    y, params = latents(model, height, width)
    y_hat, symbols, indexes = model._encode_waves(y, params)
    expected, raster_symbols, raster_indexes = raster(model, y, params)
    assert symbols.abs().max() > 3 and indexes.unique().numel() > 5  # the case is not a dead one
    assert torch.equal(y_hat, expected)
    order = torch.cat(wavefront(height, width))
    assert torch.equal(symbols[0].int(), raster_symbols[order])
    assert torch.equal(indexes[0], raster_indexes[order])


def test_wavefront_files_are_as_large_as_raster_files():
    """The same symbols and tables in another order: equal but for the coder's last bits."""
    model = build("joint_ar", N=8, M=48)
    y, params = latents(model, 16, 24)
    tables = entropy.Tables.of(model.gaussian_conditional)
    _, symbols, indexes = model._encode_waves(y, params)
    waves = entropy.encode(symbols, indexes, tables)[0]
    order = torch.argsort(torch.cat(wavefront(16, 24)))
    lines = entropy.encode(symbols[:, order], indexes[:, order], tables)[0]
    assert waves != lines
    assert len(waves) == pytest.approx(len(lines), rel=5e-4, abs=4)


@pytest.mark.parametrize("paper", PAPERS)
def test_predictions_equal_the_layers_in_exact_arithmetic(paper):
    """`Context` on rows against `exact.run` on planes, hyper parameters ahead or on demand."""
    model = build(paper)
    y, params = latents(model, 5, 7, batch=2)
    plane = torch.cat([params, exact.run(model.context_prediction, y.double())], 1)
    _, expected = exact.run(model.entropy_parameters, plane).chunk(2, 1)
    expected = exact.round_to_grid(expected, context.MEAN_BITS).flatten(2).transpose(1, 2)
    positions = torch.tensor([0, 3, 17, 34])
    for limit in (context.HYPER_BYTES, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(context, "HYPER_BYTES", limit)
            rule = model._context(params)
        assert (rule.hyper is None) == (limit == 0)
        rule.put(torch.arange(35), y.double().flatten(2).transpose(1, 2))
        assert torch.equal(rule.predict(positions)[1], expected[:, positions])
        assert torch.equal(rule.y_hat(), y)


def test_context_of_anchors_is_zero_without_bias():
    model = build("checkerboard")
    _, params = latents(model, 4, 4)
    plane = torch.cat([params, torch.zeros_like(params)], 1)
    _, expected = exact.run(model.entropy_parameters, plane).chunk(2, 1)
    expected = exact.round_to_grid(expected, context.MEAN_BITS).flatten(2).transpose(1, 2)
    _, means = model._context(params).predict(torch.arange(16), context=False)
    assert torch.equal(means, expected)
    with torch.no_grad():
        model.context_prediction.bias.add_(1)
    assert torch.equal(model._context(params).predict(torch.arange(16), context=False)[1], expected)


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("damage", ["cut", "bit", "other image"])
def test_damaged_strings_are_noticed(paper, damage):
    model = build(paper)
    x = torch.rand(2, 3, 128, 128)
    result = model.compress(x)
    strings = [list(s[:1]) for s in result["strings"]]
    if damage == "cut":
        strings[0][0] = strings[0][0][:-4]
    elif damage == "bit":
        flipped = bytearray(strings[0][0])
        flipped[len(flipped) // 2] ^= 4
        strings[0][0] = bytes(flipped)
    else:
        strings[-1][0] = result["strings"][-1][1]
    with pytest.raises(ValueError):
        model.decompress(strings, result["shape"])


# ------------------------------------------------------------------------------------------- gain
@pytest.mark.parametrize("gain, bits", [(0.5, 8), (1.0, 8), (1.5, 9), (2.0, 9), (2.5, 10),
                                        (10.0, 12)])
def test_gain(gain, bits):
    """Latents times gain: boundaries of scales in their own units, means on a finer grid."""
    torch.manual_seed(0)
    model = JointAutoregressive(4, 6)
    model.update(force=True)
    params = torch.randn(1, 12, 3, 4).double()
    table = model.gaussian_conditional.scale_table
    built = [context.Context(model.context_prediction, model.entropy_parameters, params, table, g)
             for g in (1.0, gain)]
    assert built[1].mean_bits == bits
    assert torch.allclose(built[1].boundaries * gain, built[0].boundaries, rtol=1e-12)
    means = [c.predict(torch.arange(12))[1] for c in built]
    assert torch.equal(means[1] * 2**bits, (means[1] * 2**bits).round())
    assert (means[1] - means[0]).abs().max() <= 2**-8


# ------------------------------------------------------------------------------------ int8 digits
@pytest.mark.parametrize("size, used", [(3, slice(1, 3)), (200, slice(1, 4)), (3000, slice(1, 4))])
@pytest.mark.parametrize("negated", [False, True])
def test_contexts_by_int8_digits_equal_float64(size, used, negated, monkeypatch):
    """Latents of one, two and three bytes, stored twice; a weight of 2^15 negates its channel."""
    monkeypatch.setattr(exact_int8, "TAPS_WORK", 0)
    torch.manual_seed(0)
    layer = context.CausalConv(8, 24, kernel_size=5, padding=2).requires_grad_(False)
    if negated:
        layer.weight[3, 2, 0, 0] = 0.9999999
    rows = exact.Rows(layer, "layer", torch.device("cpu"))
    if rows.digits is None:
        pytest.skip("this CPU has no exact products of int8")
    assert (rows.digits.signs is not None) == negated
    latents, digits = torch.zeros(30, 8, dtype=torch.float64), exact_int8.LatentDigits(30, 8)
    for scale in (size, 1):
        places = torch.randperm(30)[:20]
        values = torch.randint(-2**8 * scale, 2**8 * scale, (20, 8)) * 2.0**-8
        latents[places] = values.double()
        digits.put(places, rows.quantise(values.double()))
        taps = torch.randint(0, 30, (6, 12))
        expected = rows(latents[taps.view(-1)].view(6, -1))
        found = digits.sums(rows.digits, taps).add_(rows.bias).mul_(rows.scale)
        assert torch.equal(found, expected)
    assert digits.used == used


def test_latents_off_the_grid_of_means_use_the_lowest_digit():
    digits = exact_int8.LatentDigits(2, 1)
    digits.put(torch.tensor([1]), torch.tensor([[-2.0**24]]))
    assert digits.used == slice(1, 4)
    digits.put(torch.tensor([0]), torch.tensor([[5.0]]))
    assert digits.used == slice(0, 4)
    values = (digits.digits.view(4, 2, 1) * digits.units.view(4, 1, 1)).sum(0)
    assert values.flatten().tolist() == [5.0, -2.0**24]


@pytest.mark.parametrize("paper", PAPERS)
def test_models_code_alike_with_and_without_int8(paper, monkeypatch):
    x, files, whole = torch.rand(2, 3, 64, 128), [], []
    for work in (0, 2**62):
        monkeypatch.setattr(exact_int8, "TAPS_WORK", work)
        model = build(paper)
        files.append(model.compress(x)["strings"])
        whole.append(model._context(torch.zeros(1, 2 * model.M, 2, 2).double()).digits)
    assert files[0] == files[1]
    assert whole[1] is None and (whole[0] is not None or not exact_int8._int8_is_exact())
