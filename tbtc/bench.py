"""Measure the speed at size M of the paper: part of `make bench`.

    python -m common.evaluation.bench tbtc
    python -m tbtc.bench SWINT_CHECKPOINT       the bits that padding costs

It times decoding by part; ChARM against CompressAI's codec of channel groups, with the same
networks in floats; our Swin blocks against timm's and PyTorch's fused attention; and a training
step of SwinT-ChARM S in bf16 against float32.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

from common import cli, data, processes
from common.coding import entropy, exact
from common.evaluation import bench
from common.evaluation.bench import photograph

import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyModel, GaussianConditional
from compressai.latent_codecs import ChannelGroupsLatentCodec, GaussianConditionalLatentCodec
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from tbtc import slices
from tbtc.model import SLICE, ZOO, ZYC2022, build, load
from tbtc.swin import SwinAnalysis, SwinSynthesis, WindowAttention

LMBDA = 0.01


def run(rounds: int) -> None:
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name in ZOO:
            by_part(name, rounds, device)
    charm(rounds)
    attention(rounds)
    training(rounds)


@torch.no_grad()
def lively(name: str, quality: str = "M") -> ZYC2022:
    """A model with random weights whose latents take about half a bit per pixel."""
    torch.manual_seed(0)
    model = build(name, quality).to(memory_format=torch.channels_last).eval()
    x = photograph()[:, :, :256, :256]
    spread = model.g_a(x).std() / 1.5
    last = model.g_a[-1] if isinstance(model.g_a, nn.Sequential) else (
        model.g_a.layers[-1].blocks[-1].mlp.fc2)
    last.weight /= spread
    last.bias /= spread
    nets = getattr(model, "charm_scale_transforms", ())
    for net in nets:
        net.layers[-1].bias += 0.8
    if not nets and isinstance(model.h_s, nn.Sequential):
        model.h_s[-1].bias[: model.M] += 0.8
    model.update(force=True)
    return model


# ---------------------------------------------------------------------------------- decoding
def by_part(name: str, rounds: int, device: str) -> None:
    """Print the decoding time of 512x768: h_s, ChARM's networks, entropy decoding, g_s, rest."""
    model = lively(name).to(device)
    coded = model.compress(photograph().to(device))
    found: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        with stopwatch(model, device) as spent:
            start = now(device)
            model.decompress(coded["strings"], coded["shape"])
            spent["all"] = now(device) - start
        found.append(spent)
    medians = {key: sorted(f[key] for f in found[1:])[rounds // 2] for key in found[0]}
    rest = medians["all"] - sum(v for k, v in medians.items() if k != "all")
    print(f"tbtc {name[8:] or name}, {device}: decompress {medians.pop('all'):.2f} s: " + ", ".join(
        f"{key} {value:.3f}" for key, value in {**medians, "rest": rest}.items()), flush=True)


def now(device: str) -> float:
    """Time in seconds, after the device has finished its work."""
    processes.synchronize(torch.device(device))
    return time.perf_counter()


@contextmanager
def stopwatch(model: ZYC2022, device: str) -> Iterator[dict[str, float]]:
    """Measure the seconds that `decompress` spends in each part."""
    spent = {"h_s": 0.0, "ChARM": 0.0, "entropy decoding": 0.0, "g_s": 0.0}
    run_exact, decode, synthesis = exact.run, entropy.Decoders.decode, model.g_s.forward

    def watched(part: str, call: Any) -> Any:
        def timed(*args: Any) -> Any:
            start = now(device)
            result = call(*args)
            spent[part] += now(device) - start
            return result
        return timed

    def run_part(layers: Any, x: Tensor) -> Tensor:
        return watched("h_s" if layers is model.h_s else "ChARM", run_exact)(layers, x)

    slices.exact = type("exact", (), {**vars(exact), "run": staticmethod(run_part)})
    slices.entropy.Decoders.decode = watched("entropy decoding", decode)
    model.g_s.forward = watched("g_s", synthesis)
    try:
        yield spent
    finally:
        slices.exact, slices.entropy.Decoders.decode = exact, decode
        model.g_s.forward = synthesis


def charm(rounds: int) -> None:
    """Time the decoding of y given the output of h_s: ours, exact, against CompressAI's
    ChannelGroupsLatentCodec in floats; and the entropy decoding within.
    """
    model = lively("zyc2022-conv-charm")
    theirs = ChannelGroups(model)
    coded = model.compress(photograph())
    z_hat = entropy.decode_bottleneck(model.entropy_bottleneck, coded["strings"][1],
                                      coded["shape"])
    params = model.hyper(z_hat, exact.run)
    side = torch.cat([torch.cat(part, 1) for part in params], 1).float()
    with torch.no_grad():
        y_hat = model.decode(coded["strings"][0], z_hat)
        file = theirs.compress(y_hat, side)
    model.hyper = lambda *_: params  # h_s is not part of the comparison
    shape = [(SLICE, *y_hat.shape[-2:])] * len(model.slices)

    @torch.no_grad()
    def decode() -> None:
        theirs.decompress(file["strings"], shape, side)

    ours = partial(model.decode, coded["strings"][0], z_hat)
    bench.compare("tbtc: ChARM at size M, decode y of 512x768", ours, decode, rounds)
    times = []
    for _ in range(rounds):
        spent = [0.0, 0.0]
        for i, (owner, step) in enumerate(((EntropyModel, decode), (entropy.Decoders, ours))):
            name = "decompress" if owner is EntropyModel else "decode"
            original = getattr(owner, name)
            setattr(owner, name, _adding(original, spent, i))
            step()
            setattr(owner, name, original)
        times.append(tuple(spent))
    bench.show("tbtc: of it, entropy decoding", times)


def _adding(call: Any, spent: list[float], i: int) -> Any:
    """Wrap `call` so that its time in seconds is added to spent[i]."""
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        spent[i] += time.perf_counter() - start
        return result
    return timed


class Group(GaussianConditionalLatentCodec):
    """Latent codec that accepts a shape with channels, as ChannelGroupsLatentCodec passes it."""

    def decompress(self, strings: Any, shape: Any, ctx_params: Tensor, **kwargs: Any) -> Any:
        return super().decompress(strings, shape[1:], ctx_params, **kwargs)


class ChannelGroups(ChannelGroupsLatentCodec):
    """CompressAI's codec of channel groups with the networks of ChARM: means and scales of a group
    depend on its part of the hyper parameters and on the previous groups.
    """

    def __init__(self, model: ZYC2022):
        count = len(model.slices)
        super().__init__({f"y{k}": Group(
            gaussian_conditional=GaussianConditional(None), entropy_parameters=nn.Identity(),
            quantizer="ste") for k in range(count)}, {}, groups=model.slices)
        for codec in self.latent_codec.values():
            codec.gaussian_conditional.update_scale_table(
                model.gaussian_conditional.scale_table, force=True)
        self.nets = model.charm_scale_transforms, model.charm_mean_transforms

    def _get_ctx_params(self, k: int, side_params: Tensor, y_hat_: Any) -> Tensor:
        scales, means = (part.split(self.groups, 1)[k] for part in side_params.chunk(2, 1))
        return torch.cat([net[k](torch.cat([part, *y_hat_[:k]], 1))
                          for net, part in zip(self.nets, (scales, means), strict=True)], 1)


# ------------------------------------------------------------------------------ Swin transforms
def attention(rounds: int) -> None:
    """Time g_a and g_s of size M on 512x768: our blocks, timm's, and fused attention."""
    model = lively("zyc2022-swint-hyperprior")
    x = photograph()
    with torch.no_grad():
        y = model.g_a(x)
        for name, transform, given in (("g_a", model.g_a, x), ("g_s", model.g_s, y)):
            for other, blocks in (("timm's blocks", with_timm(transform)),
                                  ("fused attention", with_fused(transform))):
                expected, found = transform(given), blocks(given)
                if not torch.allclose(expected, found, atol=1e-3):
                    raise AssertionError(f"{other} differ by {(expected - found).abs().max()}")
                bench.compare(f"tbtc: SwinT M {name}, ours and {other}",
                              lambda t=transform, g=given: t(g), lambda t=blocks, g=given: t(g),
                              rounds)


def with_timm(transform: SwinAnalysis | SwinSynthesis) -> nn.Module:
    """The same transform and weights with timm's blocks."""
    copied = copy.deepcopy(transform)
    for stage in copied.layers:
        for i, block in enumerate(stage.blocks):
            theirs = SwinTransformerBlock(
                len(block.norm1.weight), (64, 96), num_heads=block.attn.heads,
                window_size=block.window, shift_size=block.shift, dynamic_mask=True,
                always_partition=True).eval()
            missing = theirs.load_state_dict(block.state_dict(), strict=False)
            if missing.missing_keys or missing.unexpected_keys:
                raise AssertionError(missing)
            stage.blocks[i] = theirs
    return copied


def with_fused(transform: SwinAnalysis | SwinSynthesis) -> nn.Module:
    """The same transform with PyTorch's scaled_dot_product_attention."""
    copied = copy.deepcopy(transform)
    for module in copied.modules():
        if isinstance(module, WindowAttention):
            module.__class__ = FusedAttention
    return copied


class FusedAttention(WindowAttention):
    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        bias = self.bias() if mask is None else (self.bias() + mask[:, None]).repeat(
            len(x) // len(mask), 1, 1, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(x), -1, -1, -1),
                                           scale=self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))


# ------------------------------------------------------------------------------------- training
def training(rounds: int) -> None:
    """Time a training step of SwinT-ChARM S on 8 crops of 256x256."""
    x = bench.tiles()
    torch.manual_seed(0)
    ours, theirs = (build("zyc2022-swint-charm", "S") for _ in range(2))
    ours = ours.to(memory_format=torch.channels_last)
    bench.compare("tbtc: training step of SwinT-ChARM S, 8x256x256, bf16",
                  bench.descent(ours, ours, x.contiguous(memory_format=torch.channels_last), LMBDA,
                                "auto"),
                  bench.descent(theirs, theirs, x.contiguous(), LMBDA, "fp32"), rounds)


# -------------------------------------------------------------------------------------- padding
@torch.no_grad()
def padding(checkpoint: Path) -> None:
    """Print bits and PSNR of SwinT weights for sizes that need padding: to 64 with masked windows,
    as in files, or to 256 as the source requires, with three padding modes.
    """
    model = load(checkpoint)
    crops = [data.to_float(data.read_image(path))[None, :, :h, :w]
             for path, (h, w) in zip(data.list_images(data.KODAK), cycle(
                 [(500, 500), (333, 470), (300, 400), (440, 312), (260, 511)]), strict=False)]
    for multiple, mode in product((64, 256), ("replicate", "constant", "reflect")):
        bpp, psnr = [], []
        for x in crops:
            h, w = x.shape[-2:]
            out = model(F.pad(x, (0, -w % multiple, 0, -h % multiple), mode=mode))
            bits = sum(-p.log2().sum().item() for p in out["likelihoods"].values())
            bpp.append(bits / (h * w))
            psnr.append(-10 * (out["x_hat"][:, :, :h, :w].clamp(0, 1) - x).square().mean()
                        .log10().item())
        print(f"tbtc padding to {multiple}, {mode}: {sum(bpp) / len(bpp):.4f} bpp, "
              f"{sum(psnr) / len(psnr):.2f} dB", flush=True)


if __name__ == "__main__":
    parser = cli.Parser(description="Measure the bits that padding costs a SwinT model.")
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a SwinT model")
    cli.run(lambda: padding(parser.parse_args().checkpoint))
