"""Export a training checkpoint as a small weights file for coding.

    python -m common.recipes.export hyperprior hyperprior/ckpts/weights/13/epoch_29.pth \\
        -o hyperprior/weights/small-0.013.pth --steps 15000

The file holds the kernels in 8 bits, the CDF tables and the fixed-point exponents, but no optimiser
state.
"""

from __future__ import annotations

import importlib
import io
import zipfile
from pathlib import Path
from typing import Any

from common import UserError, cli, data
from common.coding import exact
from common.coding.contract import Codec
from common.coding.model_file import coding_state
from common.files import refuse_folder, write_atomic
from common.layers import mask_of
from common.papers import papers

import torch
from torch import Tensor, nn

SMALL_KERNEL = 9_000  # below it: kernels next to the image (N < 120), where 8 bits hurt most
SHARES = (1.0, 0.9, 0.8, 0.7)  # fractions of the largest weight that 127 steps may reach
CROP = 256  # side of the central crops of the bundled photographs, for `calibrate`
FACTORS = tuple(1.03**k for k in range(-2, 14))  # of the scales: 0.94 to 1.47


def write(path: Path, model: Codec, **info: Any) -> None:
    """Write a small checkpoint for coding only, with kernels in 8 bits and unchanged tables.

    The weights of `model` are rounded, too, so that it equals the model in the file.
    """
    kernels, steps = {}, {}
    with torch.no_grad():
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter) or weight.dim() not in (2, 4):
                continue
            name = f"{name}.weight"
            if weight.numel() < SMALL_KERNEL:
                kernels[name] = weight.half()
                weight.copy_(kernels[name])
            else:
                out = 1 if isinstance(module, nn.ConvTranspose2d) else 0
                kernels[name], steps[name] = _to_int8(weight, out)
                weight.copy_(kernels[name] * steps[name])
    for name in model.exact_parts:
        exact.restore(model.get_submodule(name), None)  # choose exponents for the rounded weights
    state = coding_state(model)
    state["model"] = {**state["model"], **kernels}
    buffer, packed = io.BytesIO(), io.BytesIO()
    torch.save({**state, "int8_steps": steps, **info}, buffer)
    with zipfile.ZipFile(buffer) as plain, \
            zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as small:
        for name in plain.namelist():  # CDF tables are mostly zeros; torch.load can inflate
            small.writestr(zipfile.ZipInfo(name), plain.read(name), zipfile.ZIP_DEFLATED)
    write_atomic(path, packed.getvalue())


@torch.no_grad()
def calibrate(model: Codec, images: list[Tensor]) -> float:
    """Multiply the predicted scales by the factor that codes `images` in the fewest bits; return
    it (1.0 for a model without `scale_outputs`).

    images: (1, 3, H, W) in [0, 1], sides multiples of `downsampling_factor`. In training, noise
    replaces rounding, and a context model sees noisy neighbours. Rounded ones tell less, so its
    scales come out too small for the latents of a file, at low rates by up to 20 %.
    """
    outputs = model.scale_outputs()
    before = [values.clone() for values in outputs]

    def bits(factor: float) -> float:
        for values, old in zip(outputs, before, strict=True):
            values.copy_(old * factor)
        return sum(float(-torch.log2(p).sum())
                   for x in images for p in model(x)["likelihoods"].values())

    best = min(FACTORS, key=bits) if outputs else 1.0
    for values, old in zip(outputs, before, strict=True):
        values.copy_(old * best)
    return best


def _to_int8(weight: Tensor, out: int) -> tuple[Tensor, Tensor]:
    """Integers in [-127, 127], and the step of each output channel (dimension `out`).

    Of four steps, up to the one that fits the largest weight, each channel uses that with the least
    squared error: for bell-shaped weights, clipping a few costs less than a coarser step.
    """
    others = [d for d in range(weight.dim()) if d != out]
    largest = weight.abs().amax(others, keepdim=True).clamp_min(1e-12)
    steps = torch.stack([largest * share / 127 for share in SHARES])

    def rounded(step: Tensor) -> Tensor:
        return (weight / step).round().clamp(-127, 127)

    errors = torch.stack([((rounded(step) * step - weight) ** 2).sum(others, keepdim=True)
                          for step in steps])
    step = steps.gather(0, errors.argmin(0, keepdim=True))[0]
    return rounded(step).to(torch.int8), step


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("paper", choices=papers())
    parser.add_argument("checkpoint", type=Path, help="checkpoint of train.py: epoch_<n>.pth")
    parser.add_argument("-o", "--output", type=Path, required=True, help="weights file to write")
    parser.add_argument("--steps", type=cli.count,
                        help="number of training steps, those of earlier runs included; "
                        "the checkpoint's if not given")
    args = parser.parse_args(argv)
    refuse_folder(args.output)
    if args.output.resolve() == args.checkpoint.resolve():
        raise UserError(f"-o {args.output}: this would replace the checkpoint, which the training "
                        "could not continue then; give another name")
    model = importlib.import_module(f"{args.paper}.model").load(args.checkpoint)
    provenance = model.provenance
    if not provenance.config or provenance.step is None:
        raise UserError(f"{args.checkpoint}: not a checkpoint of train.py, it has no config")
    with torch.no_grad():
        for module in model.modules():
            if (mask := mask_of(module)) is not None:  # zeros take no room
                module.weight.mul_(mask)
    model.update(force=True, update_quantiles=True)
    factor = calibrate(model, [data.to_float(data.centre(
        data.read_image(path), CROP, CROP))[None] for path in data.list_images(data.TRAIN)[::5]])
    config = {key: value for key, value in provenance.config.items()
              if not str(value).startswith("/") and key not in ("dataset", "test_dataset")}
    before = config.pop("steps_before", 0)
    step = args.steps if args.steps is not None else provenance.step + before
    hardware = {"hardware": provenance.hardware} if provenance.hardware else {}
    write(args.output, model, config=config, step=step, scale_factor=round(factor, 3), **hardware)
    print(f"{args.output}: {args.output.stat().st_size:,} bytes, {step:,} steps, "
          f"scales times {factor:g}")


if __name__ == "__main__":
    cli.run(main)
