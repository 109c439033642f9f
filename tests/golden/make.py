"""Make tiny networks with random weights, code an image with them, and record what comes out.

    PYTHONPATH=tests python tests/golden/make.py [NAME ...]        without a name: what is missing

These files stand for those of users, which must decode for ever: tests/test_golden.py decodes them.
So they are never made anew together with a change of the codec, and this script refuses to
overwrite a case that exists. A new architecture or a new mode is a new case in CASES.

For each case there are NAME.json (the record), NAME.pt (weights by common/recipes/export.py),
NAME-MODE.coded, and NAME-MODE.png, every fourth pixel of the decoded image. Random kernels are made
sparse, so that the weights take little room, and are scaled so that each layer's output has a
standard deviation of one; latents then have a few quantisation levels.

Not covered, because their entropy coding is that of other cases: mod1 to mod4 and variant1 of
advdnic (as base), SwinT with one slice (as tbtc-swint-charm and tbtc-conv-hyperprior).
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from common import data
from common.recipes import export

import test_golden
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent
IMAGE = GOLDEN / "image.png"  # 96x80 pixels of kodim23
MODES: dict[str, list[str]] = {"file": []}  # name of a coded file, flags of `codec.py encode`
RATES = {"level0": ["--level", "0"], "level5": ["--level", "5"], "factor1.7": ["--factor", "1.7"]}
VARIABLE = {"lmbda0.002": ["-lb", "20"], "lmbda0.015": ["-lb", "150"],
            "patches": ["-lb", "50", "-ph", "64", "-pw", "64"],
            "source": ["-lb", "50", "-ph", "64", "-pw", "128", "--format", "source"]}
SMALL = {"N": 8, "M": 12}
ADVDNIC = {"num_filters": 8, "scales_max": 16.0, "scales_levels": 24}
CONVNEXT = {"embed_dim": 8, "latent_dim": 12, "depths": [1] * 6, "layer_scale_init": 0.5}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, list[str]]]] = {
    # name: paper, class, arguments, modes
    "factorized": ("factorized", "Factorized", SMALL, MODES),
    "hyperprior": ("hyperprior", "Hyperprior", SMALL, MODES),
    "joint_ar": ("joint_ar", "JointAutoregressive", SMALL, MODES),
    "joint_ar-seminar": ("joint_ar", "JointAutoregressive", SMALL | {"gdn_variant": "seminar"},
                         MODES),
    "checkerboard": ("checkerboard", "Checkerboard", SMALL, MODES),
    "checkerboard-odd": ("checkerboard", "Checkerboard", SMALL | {"anchor_parity": "odd"}, MODES),
    "convnextic-v0": ("convnextic", "ConvNeXTIC", CONVNEXT | {"variant": "v0_ln"}, MODES),
    "convnextic-v1": ("convnextic", "ConvNeXTIC", CONVNEXT | {
        "variant": "v1_patch", "block_norm": "gdn", "decoder_dw": "convtranspose"}, MODES),
    "convnextic-v2": ("convnextic", "ConvNeXTIC", CONVNEXT | {"variant": "v2_stride2"}, MODES),
    "convnextic-v3": ("convnextic", "ConvNeXTIC", CONVNEXT | {
        "variant": "v3_scctx", "block_norm": "batchnorm"}, MODES),
    "convnextic-v4": ("convnextic", "ConvNeXTIC", CONVNEXT | {"variant": "v4_ea"}, MODES),
    "convnextic-v5": ("convnextic", "ConvNeXTIC", CONVNEXT | {"variant": "v5_vr"}, VARIABLE),
    "qvrf-balle": ("qvrf", "QVRF", SMALL | {"model": "balle"}, RATES),
    "qvrf-minnen": ("qvrf", "QVRF", SMALL | {"model": "minnen"}, RATES),
    "qvrf-cheng": ("qvrf", "QVRF", {"model": "cheng", "N": 8}, RATES),
    "tbtc-conv-hyperprior": ("tbtc", "ZYC2022", {
        "transform": "conv", "prior": "hyperprior", "widths": (12, 8, 8)}, MODES),
    "tbtc-conv-charm": ("tbtc", "ZYC2022", {
        "transform": "conv", "prior": "charm", "widths": (64, 8, 8)}, MODES),
    "tbtc-swint-charm": ("tbtc", "ZYC2022", {
        "transform": "swint", "prior": "charm", "widths": (32, 32, 32, 64, 32, 32),
        "charm_widths": "paper", "split": "post"}, MODES),
    "tbtc-tcm": ("tbtc", "TCM", {"N": 32, "M": 40, "Hd": 16}, MODES),
    "advdnic-base": ("advdnic", "Experiment", ADVDNIC | {"experiment": "base"}, MODES),
    "advdnic-variant2": ("advdnic", "Experiment", ADVDNIC | {
        "experiment": "variant2"}, MODES),
    "advdnic-variant3": ("advdnic", "Experiment", ADVDNIC | {
        "experiment": "variant3"}, MODES),
    "advdnic-variant3-strided": ("advdnic", "Experiment", ADVDNIC | {
        "experiment": "variant3", "stages": 2, "ep_compat": True}, MODES),
    "advdnic-variant3_old": ("advdnic", "Experiment", ADVDNIC | {
        "experiment": "variant3_old"}, MODES),
    "advdnic-variant4": ("advdnic", "Experiment", ADVDNIC | {
        "experiment": "variant4", "num_filters": 128}, MODES),
}
TAPS = 12  # weights other than zero of each output channel, on average
TERNARY = {  # larger networks have fewer, which within a layer differ in their sign only
    "convnextic-v1": 4, "convnextic-v2": 4, "convnextic-v3": 4, "convnextic-v4": 4,
    "qvrf-cheng": 4, "tbtc-conv-charm": 4, "tbtc-swint-charm": 1.5, "tbtc-tcm": 1.25,
    "advdnic-variant3-strided": 4, "advdnic-variant4": 1}
WHOLE_TABLE = ("hyperprior",)  # cases with CompressAI's 64 scales, whose CDF tables take 30 KB
SCALES = torch.linspace(math.log(0.11), math.log(16), 24).exp()  # of the others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a case that has no files yet")
    wanted = parser.parse_args().names
    existing = {path.stem for path in GOLDEN.glob("*.json")}
    if unknown := sorted(set(wanted) - CASES.keys()):
        raise SystemExit(f"{', '.join(unknown)}: choose from {', '.join(CASES)}")
    if refused := sorted(existing & set(wanted)):
        raise SystemExit(f"{', '.join(refused)}: exists and is never made anew")
    torch.set_num_threads(1)
    for name in wanted or [name for name in CASES if name not in existing]:
        make(name)


def make(name: str) -> None:
    """Write the files of one case, the record last."""
    paper, kind, options, modes = CASES[name]
    x = data.to_float(data.read_image(IMAGE))[None]
    model = random_model(paper, kind, options, x, TERNARY.get(name))
    scales = None if name in WHOLE_TABLE or paper == "advdnic" else SCALES
    model.update(scale_table=scales, force=True, update_quantiles=True)
    weights = GOLDEN / f"{name}.pt"
    known = {key: value for key, value in options.items() if key in getattr(model, "options", ())}
    export.SMALL_KERNEL = 256  # of such narrow networks, too, the larger kernels are kept in 8 bits
    export.write(weights, model, config=known, step=0)
    join_tensors(weights)
    files = {}
    for mode, flags in modes.items():
        coded, image = GOLDEN / f"{name}-{mode}.coded", GOLDEN / f"{name}-{mode}.png"
        importlib.import_module(f"{paper}.codec").main(
            ["encode", str(IMAGE), "-o", str(coded), "--checkpoint", str(weights), "--device",
             "cpu", *flags])
        with tempfile.TemporaryDirectory() as folder:
            x_hat = test_golden.decode_image(paper, weights, coded, Path(folder, "decoded.png"))
        data.write_image(test_golden.subsample(x_hat), image)
        y_hat = None
        if mode != "source":
            latents = test_golden.decode_latents(paper, weights, coded)
            y_hat = test_golden.digest_of(latents)
            check_variety(f"{name}-{mode}", torch.cat([t.flatten() for t in latents]),
                          x_hat.float())
        files[mode] = {"coded": coded.name, "x_hat": image.name, "shape": list(x_hat.shape),
                       "y_hat": y_hat}
    record = {"paper": paper, "weights": weights.name, "files": files}
    (GOLDEN / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def check_variety(name: str, y_hat: Tensor, x_hat: Tensor) -> None:
    """Refuse latents or an image that are nearly constant."""
    levels = y_hat.round().unique().numel()
    print(f"{name}: {y_hat.numel()} latents, {levels} levels, standard deviation {y_hat.std():.2f},"
          f" {float((y_hat.round() == 0).float().mean()):.0%} zeros; image {x_hat.mean():.0f} +- "
          f"{x_hat.std():.0f}")
    if levels < 5 or x_hat.std() < 8:
        raise SystemExit(f"{name}: too little variety; scale its weights otherwise")


# --------------------------------------------------------------------------------------- weights
@torch.no_grad()
def random_model(paper: str, kind: str, options: dict[str, Any], x: Tensor,
                 ternary: float | None) -> nn.Module:
    """A network of sparse random kernels, each scaled by what it makes of the image x.

    ternary: number of weights of an output channel that are 1 or -1 before the scaling; none:
    TAPS weights of different sizes.
    """
    torch.manual_seed(0)
    module = importlib.import_module(f"{paper}.{'tcm' if kind == 'TCM' else 'model'}")
    model = getattr(module, kind)(**options)
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if type(layer).__name__ == "ScalingNet":  # gains that depend on lmbda
            layer.layers[2].weight.normal_(0, 0.2)
        elif isinstance(weight, nn.Parameter) and weight.dim() in (2, 4):
            outputs = weight.shape[isinstance(layer, nn.ConvTranspose2d)]
            kept = torch.rand_like(weight) < (ternary or TAPS) * outputs / weight.numel()
            weight.copy_((weight.sign() if ternary else weight) * kept)
            if hasattr(layer, "mask"):
                weight *= layer.mask
            if layer.bias is not None:
                few = torch.rand_like(layer.bias) < (0.25 if ternary else 1)
                layer.bias.copy_(torch.randint(-2, 3, layer.bias.shape) / 8 * few)
    for name, table in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            table.copy_(torch.randint(-2, 3, table.shape) * (torch.rand_like(table) < 0.1))
    scaled: dict[str, nn.Module] = {}  # in the order of execution
    hooks = [layer.register_forward_hook(
        lambda layer, _, output, name=name: scale_output(scaled, name, layer, output))
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "weight", None), nn.Parameter) and layer.weight.dim() > 1
        and not name.startswith("scale_")]
    padded = nn.functional.pad(x, (0, -x.shape[3] % 128, 0, -x.shape[2] % 128), mode="replicate")
    model.train()
    model(padded, **({"lmbda": 0.005} if getattr(model, "variable_rate", False) else {}))
    for hook in hooks:
        hook.remove()
    for part, gain, offset in (("g_a", 3.0, 0.0), ("h_a", 3.0, 0.0), ("g_s", 0.25, 0.5)):
        last = [layer for name, layer in scaled.items() if name.startswith(f"{part}.")][-1:]
        for layer in last:
            layer.weight *= gain
            if layer.bias is not None:
                layer.bias.copy_(layer.bias * gain + offset)
    return model.eval()


def scale_output(scaled: dict[str, nn.Module], name: str, layer: nn.Module, output: Tensor
                 ) -> Tensor | None:
    """Give a layer's first output a standard deviation of one, by its weight and bias."""
    if name in scaled:
        return None
    scaled[name] = layer
    deviation = float(output.std())
    if not deviation > 1e-6:
        return None
    layer.weight /= deviation
    if layer.bias is not None:
        layer.bias /= deviation
    return output / deviation


def join_tensors(path: Path) -> None:
    """Write a weights file again with one storage for all tensors of a type, of which they are
    views: hundreds of small ones would take more room for their names than for their values.
    """
    state = torch.load(path, weights_only=True)
    found: dict[torch.dtype, list[Tensor]] = {}

    def visit(value: Any, change: bool) -> Any:
        if isinstance(value, dict):
            return type(value)((key, visit(v, change)) for key, v in value.items())
        if isinstance(value, (list, tuple)):
            return type(value)(visit(v, change) for v in value)
        if not isinstance(value, Tensor):
            return value
        if not change:
            found.setdefault(value.dtype, []).append(value)
            return value
        return next(views[value.dtype])

    visit(state, False)
    views = {}
    for dtype, tensors in found.items():
        parts = torch.cat([t.flatten() for t in tensors]).split([t.numel() for t in tensors])
        views[dtype] = iter([p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])
    buffer = io.BytesIO()
    torch.save(visit(state, True), buffer)
    with zipfile.ZipFile(buffer) as plain, \
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as small:
        for name in plain.namelist():
            small.writestr(zipfile.ZipInfo(name), plain.read(name), zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    main()
