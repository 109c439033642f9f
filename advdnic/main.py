"""The source's command line: train, compress, decompress, benchmark.

    python main.py --verbose --model-dir="experiments/base_model/generator" train \\
        --train-data-dir="data/train" --eval-data-dir="data/benchmark/kodak" --epochs=1000 ...
    python main.py --verbose --model-dir="..." compress overfit.png         overfit.png.ncf
    python main.py --verbose --model-dir="..." decompress overfit.png.ncf   overfit.png.ncf.png
    python main.py --verbose --model-dir="..." benchmark --data-dir=FOLDER
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from pathlib import Path
from typing import Any

from common import UserError, cli, data, metrics, processes
from common.coding import bitstream, image_file
from common.evaluation import evaluate
from common.evaluation.results import image_names, image_record
from common.files import read_file, write_atomic
from common.training.checkpoints import epoch_checkpoints
from common.training.checkpoints import newest as newest_checkpoint

import torch
from torch import Tensor

from advdnic import params, train
from advdnic.model import Experiment, load
from advdnic.pixelcnn import PixelCNN

COLUMNS = ("image", "bytes", "actual bpp", "information bpp", "mse", "psnr", "ms-ssim",
           "ms-ssim (dB)", "encoding seconds", "decoding seconds")


def parser_of() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Train an experiment, code images with it.")
    parser.add_argument("--name", help="name of the run, shown in its log")
    parser.add_argument("--verbose", "-V", action="store_true", help="print the measurements")
    parser.add_argument("--model-dir", type=Path, help="folder of params.json and checkpoints")
    parser.add_argument("--use_adversarial_loss", "--use-adversarial-loss", type=params.boolean,
                        default=False, help="not supported, as there is no discriminator")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the experiment of --model-dir")
    train.add_flags(training)
    training.set_defaults(resume="auto")  # the source always continues what is in --model-dir
    for name, what in (("compress", "code an image as a .ncf file"),
                       ("decompress", "decode a .ncf file to a .png")):
        command = commands.add_parser(name, help=what)
        command.add_argument("input_file", type=Path, help="file to read")
        command.add_argument("output_file", type=Path, nargs="?",
                             help="file to write; the name of the input with "
                             f"{'.ncf' if name == 'compress' else '.png'} appended if not given")
        if name == "compress":
            command.add_argument("--plot", type=Path, help="image file for the ten panels; with "
                                 "-V, OUTPUT.panels.png if not given")
    bench = commands.add_parser("benchmark", help="code a folder of images, decode and verify")
    bench.add_argument("--data-dir", help="folder of test images; Kodak if not given")
    bench.add_argument("--allow-growth", type=params.boolean, default=True,
                       help="without effect; GPU memory always grows on demand")
    bench.add_argument("--decode", action=argparse.BooleanOptionalAction, default=True,
                       help="decode each file and compare it with the encoder's reconstruction")
    bench.add_argument("--outdir", type=Path,
                       help="folder of results; MODEL_DIR/benchmark if not given")
    for command in (*(commands.choices[c] for c in ("compress", "decompress")), bench):
        command.add_argument("--device", default="auto",
                             help="device that runs the codec: auto, cpu or cuda")
        command.add_argument("--threads", type=cli.threads, default=0,
                             help="number of CPU threads; 0 uses all")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parser_of().parse_args(argv)
    if args.use_adversarial_loss:
        raise UserError("--use_adversarial_loss: there is no discriminator, here as in the source")
    if args.model_dir is None:
        raise UserError("--model-dir: name the folder of the model, before the command")
    if args.command == "train":
        training = cli.Parser()
        train.add_flags(training)
        train.run(args, cli.summary(training, args))
        return
    device = processes.start(args.device, threads=args.threads)
    model = newest(args.model_dir, device)
    {"compress": compress, "decompress": decompress, "benchmark": benchmark}[args.command](
        model, args)


def newest(folder: Path, device: torch.device) -> Experiment:
    """Load the newest model of a folder, which must match its params.json."""
    values = params.read(folder)
    path = last_checkpoint(folder)
    model = load(path, device)
    found = {key: getattr(model, key) for key in model.options}
    if model.kind not in ("mod2", "mod3"):  # these have their own widths
        found["num_filters"] = model.N
    if isinstance(getattr(model, "context_model", None), PixelCNN):
        found |= {"resnets": model.resnets, "stages": model.stages}
    for key, value in found.items():
        if value != values[key]:
            raise UserError(f"{path}: is of {key} {value}, {params.NAME} says "
                            f"{values[key]}")
    return model


def last_checkpoint(folder: Path) -> Path:
    path = newest_checkpoint([*folder.glob("latest.pth"), *epoch_checkpoints(folder)])
    if path is None:
        raise UserError(f"{folder}: holds no checkpoint; train here first")
    return path


# ------------------------------------------------------------------------------------ one image
def compress(model: Experiment, args: argparse.Namespace) -> None:
    """Compress an image; with -V, print its measurements, write them to OUTPUT.txt, and plot."""
    output = args.output_file or appended(args.input_file, ".ncf")
    text_file, plot = (output.with_name(f"{output.name}.{end}") for end in ("txt", "panels.png"))
    plot = args.plot or plot
    protect([args.input_file], [output, *([text_file] if args.verbose else []),
                                *([plot] if args.verbose or args.plot else [])])
    image = data.read_image(args.input_file)
    x = data.to_float(image.to(next(model.parameters()).device))
    coded = model.compress(image_file.pad(x[None], model.downsampling_factor))
    file, = image_file.pack_images(model, coded, x.shape[1:], bitstream.fingerprint(model))
    write_atomic(output, file)
    print(f"{output}: {len(file)} bytes, {metrics.bpp(len(file), *x.shape[1:]):.4f} bpp")
    if not args.verbose and not args.plot:
        return
    inner = looked_at(model, coded, x.shape[1:])
    if args.verbose:
        text = report(measures(image, inner, len(file)))
        print(text)
        write_atomic(text_file, f"{text}\n".encode())
        bits = inner["y_bits"].sum((1, 2)).tolist()
        print("bits of the channels of y, in descending order: " + ", ".join(
            f"{k}: {bits[k]:.0f}" for k in sorted(range(len(bits)), key=lambda k: -bits[k])))
    panels(image, inner, plot)


def decompress(model: Experiment, args: argparse.Namespace) -> None:
    file = read_file(args.input_file)
    output = args.output_file or appended(args.input_file, ".png")
    protect([args.input_file], [output])
    data.write_image(image_file.decode_image(model, file), output)
    print(f"{output}: decoded from {args.input_file}")


def appended(path: Path, suffix: str) -> Path:
    if not path.name:
        raise UserError(f"cannot read {path}: it is a folder")
    return path.with_name(path.name + suffix)


def protect(inputs: list[Path], outputs: list[Path]) -> None:
    """Raise UserError if an output would replace an input or another output."""
    taken = {path.resolve() for path in inputs}
    for path in outputs:
        if path.resolve() in taken:
            raise UserError(f"{path}: would replace an input or another output; name "
                            "another output")
        taken.add(path.resolve())


@torch.no_grad()
def looked_at(model: Experiment, coded: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Intermediate results of a coded image, on the CPU: latents, parameters, bits, x_hat."""
    conditional = model.gaussian_conditional
    y_bits = -conditional.likelihood_lower_bound(conditional._likelihood(
        coded["y_hat"], coded["scales"], coded["means"])).double().log2()
    z_bits = -model.entropy_bottleneck(coded["z"])[1].double().log2()
    inner = {name: coded[name][0].cpu() for name in ("y", "z", "y_hat", "scales", "means")}
    return inner | {
        "x_hat": image_file.crop(model.decoded(coded["y_hat"]), size)[0].cpu(),
        "y_bits": y_bits[0].cpu(), "z_bits": z_bits[0].cpu(), "floor": model.scales_min,
        "bpp": float((y_bits.sum() + z_bits.sum()) / (size[0] * size[1]))}


def measures(image: Tensor, inner: dict[str, Any], size: int) -> dict[str, Any]:
    """Measurements of an image (3, H, W), uint8; inner: from `looked_at`; size: bytes of file."""
    decoded = data.to_uint8(inner["x_hat"])
    row = image_record("", image, decoded, size)
    ms_ssim = row["ms-ssim-rgb"] if math.isfinite(row["ms-ssim-rgb"]) else None
    return {"bytes": size, "actual bpp": row["bpp"], "information bpp": inner["bpp"],
            "mse": float((image.double() - decoded.double()).square().mean()),
            "psnr": row["psnr-rgb"], "ms-ssim": ms_ssim,
            "ms-ssim (dB)": None if ms_ssim is None or ms_ssim >= 1 else
            -10 * math.log10(1 - ms_ssim)}


def report(values: dict[str, Any]) -> str:
    """The six lines that the source prints."""
    return "\n".join([f"Mean squared error: {values['mse']:.4f}",
                      f"PSNR (dB): {values['psnr']:.2f}",
                      f"Multiscale SSIM: {number(values['ms-ssim'])}",
                      f"Multiscale SSIM (dB): {number(values['ms-ssim (dB)'])}",
                      f"Information content in bpp: {values['information bpp']:.4f}",
                      f"Actual bits per pixel: {values['actual bpp']:.4f}"])


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def panels(image: Tensor, inner: dict[str, Any], path: Path) -> None:
    """Plot ten panels, for the channels of y and of z with the most bits."""
    from matplotlib.figure import Figure

    k, m = (int(inner[f"{name}_bits"].sum((1, 2)).argmax()) for name in ("y", "z"))
    scales = inner["scales"].clamp_min(inner["floor"])
    error = inner["y"][k] - inner["means"][k]
    shown = [("input", image.permute(1, 2, 0)),
             ("reconstruction", data.to_uint8(inner["x_hat"]).permute(1, 2, 0)),
             (f"latent, channel {k}", inner["y"][k]),
             ("normalised latent", error / scales[k]), (f"hyper-latent, channel {m}",
                                                         inner["z"][m]),
             ("prediction error", error), ("predicted means", inner["means"][k]),
             ("predicted scales", scales[k]), ("latent's bits", inner["y_bits"][k]),
             ("hyper-latent's bits", inner["z_bits"][m])]
    figure = Figure(figsize=(20, 8), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(2, 5).flat, shown, strict=True):
        picture = axes.imshow(values.numpy())
        axes.set_title(title)
        axes.axis("off")
        if values.dim() == 2:
            figure.colorbar(picture, ax=axes, shrink=0.7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    write_atomic(path, buffer.getvalue())
    print(f"{path}: ten panels")


# ------------------------------------------------------------------------------------- benchmark
def benchmark(model: Experiment, args: argparse.Namespace) -> None:
    """Code, decode and compare each image; write a CSV with a row per image and their mean."""
    paths = evaluate.test_images(args.data_dir)
    folder = args.outdir or args.model_dir / "benchmark"
    names = image_names(paths)
    protect(paths, [folder / f"{name}.{end}" for name in names.values()
                    for end in ("ncf", "txt", "png")])
    fingerprint, rows = bitstream.fingerprint(model), []
    device = next(model.parameters()).device

    def encode(x: Tensor) -> tuple[dict[str, Any], bytes]:
        coded = model.compress(image_file.pad(x[None], model.downsampling_factor))
        return coded, image_file.pack_images(model, coded, x.shape[1:], fingerprint)[0]

    for i, (path, name) in enumerate(names.items()):
        image = data.read_image(path)
        x = data.to_float(image.to(device))
        if i == 0:  # the first pass of a process is slower
            encode(x)
        (coded, file), encoding = evaluate.time_call(lambda x=x: encode(x), device)
        write_atomic(folder / f"{name}.ncf", file)
        inner = looked_at(model, coded, x.shape[1:])
        row = {"image": name, **measures(image, inner, len(file)), "encoding seconds": encoding}
        write_atomic(folder / f"{name}.txt", f"{report(row)}\n".encode())
        if args.decode:
            file = read_file(folder / f"{name}.ncf")
            x_hat, row["decoding seconds"] = evaluate.time_call(
                lambda file=file: image_file.decode_image(model, file, fingerprint), device)
            if not torch.allclose(x_hat.cpu(), inner["x_hat"], atol=1e-4):
                raise UserError(f"{path}: its file decodes to another image than the encoder's")
            data.write_image(x_hat, folder / f"{name}.png")
        rows.append(row)
        if args.verbose:
            print(f"{name}: {row['actual bpp']:.4f} bpp, {row['psnr']:.2f} dB", flush=True)
    known = {key: [r[key] for r in rows if r.get(key) is not None] for key in COLUMNS[1:]}
    rows.append({"image": "mean"} | {key: sum(v) / len(v) for key, v in known.items() if v})
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                      for row in rows])
    write_atomic(folder / "compression_metrics.csv", text.getvalue().encode())
    mean = rows[-1]
    print(f"{len(paths)} images: {mean['actual bpp']:.4f} bpp, {mean['psnr']:.2f} dB; "
          f"{folder / 'compression_metrics.csv'}")


if __name__ == "__main__":
    cli.run(main)
