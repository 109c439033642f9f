"""TBTC: bench.py, on small networks: what it measures, and that its rivals compute the same."""

import re

from common import data
from common.coding import entropy, exact

import pytest
import torch
from helpers import cut_kodak
from tbtc_cases import photograph, tiny

from tbtc import bench, slices


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setattr(bench, "build", lambda name, *_: tiny(name))
    monkeypatch.setattr(bench, "photograph", lambda: photograph(256, 256))  # whole windows


@pytest.mark.parametrize("name", ["zyc2022-conv-charm", "zyc2022-swint-charm"])
def test_each_part_of_decoding_is_measured(name):
    model, decode = tiny(name), entropy.Decoders.decode
    coded = model.compress(photograph())
    with bench.stopwatch(model, "cpu") as spent:
        model.decompress(coded["strings"], coded["shape"])
    assert set(spent) == {"h_s", "ChARM", "entropy decoding", "g_s"} and all(spent.values())
    assert slices.exact is exact and entropy.Decoders.decode is decode


def test_all_comparisons_run(capsys):
    """`attention` raises an error if timm's blocks or fused attention compute something else."""
    bench.by_part("zyc2022-swint-hyperprior", 1, "cpu")
    bench.charm(1)
    bench.attention(1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 + 4, lines


def test_padding_that_the_page_reports(tmp_path, monkeypatch, capsys):
    """Filling up to a multiple of 64 costs fewer bits than to 256, with any border."""
    torch.save(tiny("zyc2022-swint-charm").state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(data, "KODAK", cut_kodak(tmp_path, {"images": 1}, 280, 300) / "images")
    bench.padding(tmp_path / "weights.pth")
    rates = {(int(multiple), mode): float(bpp) for multiple, mode, bpp in re.findall(
        r"padding to (\d+), (\w+): ([\d.]+) bpp", capsys.readouterr().out)}
    assert set(rates) == {(multiple, mode) for multiple in (64, 256)
                          for mode in ("replicate", "constant", "reflect")}
    assert all(rates[64, mode] < rates[256, mode] for mode in ("replicate", "constant", "reflect"))
