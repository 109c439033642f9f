"""advDNIC: what the contexts see, and that their decoders compute the same bits."""

from common.coding import exact

import pytest
import torch

from advdnic.model import build
from advdnic.pixelcnn import PixelCNN
from advdnic.pixelcnn_decoders import Steps, Waves

NETS = {"variant3_old": lambda: build("variant3_old", 4).context_model,
        "flat": lambda: PixelCNN(4), "flat, 2 resnets": lambda: PixelCNN(4, 2),
        "strided": lambda: PixelCNN(4, 1, 2)}
REACH = {"variant3_old": (2, 2, 2), "flat": (7, 6, 5), "flat, 2 resnets": (11, 10, 9)}


def dependence(net, height, width):
    """seen[a, b]: whether the output at position a depends on the input at b."""
    x = torch.randn(1, 4, height, width, dtype=torch.float64, requires_grad=True)
    out = net.double()(x).flatten(2)
    rows = [torch.autograd.grad(out[..., k].sum(), x, retain_graph=True)[0]
            for k in range(out.shape[2])]
    return torch.stack(rows).abs().sum((1, 2)).flatten(1) > 0


@pytest.mark.parametrize("name", NETS)
def test_context_is_causal(name):
    torch.manual_seed(0)
    seen = dependence(NETS[name](), 8, 8)
    assert not seen.triu().any()  # neither itself nor what follows


@pytest.mark.parametrize("name", REACH)
def test_reach_of_the_context(name):
    torch.manual_seed(0)
    up, left, right = REACH[name]
    height, width, i, j = up + 2, left + right + 3, up + 1, left + 1
    seen = dependence(NETS[name](), height, width)[i * width + j].view(height, width)
    rows, columns = seen.nonzero().unbind(1)
    assert (i - rows.min(), j - columns.min(), columns.max() - j) == (up, left, right)


def test_strided_context_sees_all_near_it():
    """Every earlier position near by in its own row and in the one above, whatever its parity."""
    torch.manual_seed(0)
    height, width = 8, 16
    seen = dependence(NETS["strided"](), height, width)
    for i in range(1, height):
        for j in range(width):
            row = seen[i * width + j].view(height, width)
            assert row[i - 1, max(0, j - 6) : j + 3].all() and row[i, max(0, j - 6) : j].all()


@pytest.mark.parametrize("name, kind, height, width", [
    ("flat", Steps, 8, 12), ("flat, 2 resnets", Steps, 4, 5), ("strided", Steps, 8, 12),
    ("flat", Waves, 8, 12), ("flat", Waves, 4, 1), ("flat", Waves, 1, 9), ("flat", Waves, 12, 4),
    ("flat, 2 resnets", Waves, 7, 23)])
def test_decoders_are_the_whole_pass(name, kind, height, width):
    """By pixels or by waves, what has been computed kept: the same bits; and close to floats."""
    torch.manual_seed(0)
    net = NETS[name]().eval()
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    y_hat = torch.randint(-3, 4, (2, 4, height, width)).double()
    whole, rows = exact.run(net, y_hat), y_hat.flatten(2).transpose(1, 2)
    for _ in range(2):
        seen, decoded = [], kind(net, 2, height, width, y_hat.device)
        for positions, phi in decoded:
            seen += positions.tolist()
            assert torch.equal(phi, whole.flatten(2).transpose(1, 2)[:, positions])
            decoded.put(rows[:, positions])
        assert sorted(seen) == list(range(height * width))
    assert (net.float()(y_hat.float()) - whole).abs().max() < 0.02 * whole.abs().max()


def test_waves_know_no_strides():
    with pytest.raises(ValueError, match="Steps"):
        Waves(NETS["strided"](), 1, 4, 4, torch.device("cpu"))


def test_a_part_of_the_plane_is_enough():
    """Its reach gives the values of the whole plane; one less, up or to a side, does not."""
    torch.manual_seed(0)
    net = PixelCNN(4).double()
    x = torch.randn(1, 4, 12, 20, dtype=torch.float64)
    whole = net(x)
    i, j = 10, 10

    def error(up, left, right):
        part = net(x[:, :, i - up : i + 1, j - left : j + right + 1])
        return (part[:, :, up, left] - whole[:, :, i, j]).abs().max()

    assert error(7, 6, 5) < 1e-12
    assert error(6, 6, 5) > 1e-9 and error(7, 5, 5) > 1e-9 and error(7, 6, 4) > 1e-9


def test_old_variant_has_minnen_s_context():
    """One masked 5x5: as many parameters as CompressAI's joint model, but for the 5x5's size."""
    model = build("variant3_old")
    mask = model.context_model.mask
    assert mask.sum() == 12 * mask.shape[0] * mask.shape[1]
