"""What every training run needs and no paper should write twice.

Flags and YAML, seeds, device and precision, several processes, atomic checkpoints and exact resume,
logs. The training loop itself stays in each paper's train.py.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common import UserError, exact

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from tqdm import tqdm

PRECISIONS = ("bf16", "fp32")
TOLD = "LIC_ERROR_TOLD"  # file that the first of several processes makes when it reports an error
SWITCHES = (argparse._StoreTrueAction, argparse.BooleanOptionalAction)  # flags without a value


# ---------------------------------------------------------------------------- command lines
def cli(main: Callable[[], None]) -> None:
    """Run a script's main(): a UserError becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as e:
        # a loader process sends its whole traceback; the message is the last line of it
        _fail(str(e).strip().splitlines()[-1].removeprefix("common.UserError: "), 2)
    except OSError as e:
        _fail(f"{e.filename}: {e.strerror or e}" if e.filename else str(e.strerror or e), 2)
    except KeyboardInterrupt:
        _fail("interrupted (a training goes on with --resume)", 130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _fail(message: str, status: int) -> None:
    """One line on stderr, once for all processes of `launch`, and the exit status."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # ends its line
    first = True
    if told := os.environ.get(TOLD):
        try:
            os.close(os.open(told, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            first = False
    if first:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if told:
        sys.stdout.flush()
        os._exit(status)  # the others may wait for this process: `launch` ends them
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """argparse with our manners: one line on errors, defaults shown in --help."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                         allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse flags with the priority: defaults < YAML file of --config < command line.

    The keys of the YAML file are the flags' names; an unknown key or a wrong value is an error.
    """
    first = Parser(add_help=False)
    first.add_argument("--config")
    path = first.parse_known_args(argv)[0].config
    if path:
        parser.set_defaults(**_read_config(Path(path), parser))
    return parser.parse_args(argv)


def add_flags(parser: argparse.ArgumentParser, lr_schedule: str, without: tuple[str, ...] = ()
              ) -> None:
    """The flags that all our training scripts have beside those of their sources.

    without: those that the source has too, in a form of its own.
    """
    group = parser.add_argument_group("ours, beside the source's flags")

    def add(flag: str, **settings: Any) -> None:
        if flag not in without:
            group.add_argument(flag, **settings)

    add("--config", help="YAML file of flags; the command line wins over it")
    add("--resume", action="store_true", help="continue this run from its newest checkpoint")
    add("--metric", default="mse", choices=["mse", "ms-ssim"], help="distortion")
    add("--optimizer", default="adam", choices=["adam", "muon"], help="muon: fewer steps")
    add("--aux-lr", type=positive_float, default=1e-3, help="learning rate of the quantiles")
    add("--lr-schedule", default=lr_schedule,
        choices=["plateau", "multistep", "cosine", "constant"], help="stepped once an epoch")
    add("--milestones", type=int, nargs="*", default=[40, 90, 140], help="epochs, for multistep")
    add("--clip-max-norm", type=positive_float, default=1.0, help="gradient norm limit")
    add("--patch-size", type=positive_int, default=256, help="side of the square crops, pixels")
    add("--flip", action=argparse.BooleanOptionalAction, default=False,
        help="flip half of the crops left to right")
    add("--steps-per-epoch", type=count, default=0, help="0: one pass over the data")
    add("--test-every", type=positive_int, default=1, help="epochs between validations")
    add("--save-every", type=positive_int, default=1, help="epochs between kept checkpoints")
    add("--seed", type=seed_number, default=0, help="of weights, noise, crops")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--precision", default="auto", choices=["auto", *PRECISIONS],
        help="of training; auto: bf16 where the hardware has it")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile: pays after about five minutes")
    add("--graph", action=argparse.BooleanOptionalAction, default=True,
        help="on one GPU, record a training step as a CUDA graph and replay it")
    add("--threads", type=threads, default=0, help="CPU threads; 0: all")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The 'flag: value' lines of a configuration file."""
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as e:
        raise UserError(f"--config {path}: {e.strerror or e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"--config {path}: not YAML ({' '.join(str(e).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: must hold 'flag: value' lines")
    return values


def _read_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    values = read_yaml(path)
    actions = {a.dest: a for a in parser._actions} | {  # other names of a flag, too
        name.lstrip("-").replace("-", "_"): a for a in parser._actions for name in a.option_strings}
    result = {}
    for key, value in values.items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None or action.dest in ("help", "config"):
            raise UserError(f"--config {path}: there is no flag --{key}")
        result[action.dest] = _convert(action, value, f"--config {path}: {key}")
    return result


def _convert(action: argparse.Action, value: Any, where: str) -> Any:
    if value is None or isinstance(action, SWITCHES):
        ok = isinstance(value, bool) if value is not None else action.default is None
        converted = value
    else:
        items = value if isinstance(value, list) else [value]
        kind = action.type or str
        try:
            converted = [kind(str(v)) for v in items]
            ok = all(action.choices is None or v in action.choices for v in converted)
        except ValueError:
            ok = False
        if ok and action.nargs is None:
            ok, converted = len(converted) == 1, converted[0]
    if not ok:
        choices = f" (choose from {', '.join(map(str, action.choices))})" if action.choices else ""
        raise UserError(f"{where}: {value!r} is not a value for this flag{choices}")
    return converted


# ----------------------------------------------------------------- processes, device, precision
def launch(gpu_ids: str) -> None:
    """Obey --gpu_id '0 1 2': one process per id, as torchrun would start them.

    Without a GPU the same number of processes runs on the CPU (gloo). Returns in the processes
    that do the work; the one that started them ends with the exit status of the first to fail.
    """
    ids = gpu_ids.replace(",", " ").split()
    if not ids or not all(i.isdigit() for i in ids):
        raise UserError(f"--gpu_id '{gpu_ids}': give GPU numbers separated by spaces, as '0 1 2'")
    if "RANK" in os.environ:
        return
    if gpu_ids != "0":  # numbers count within a list that is set already, as clusters do
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [visible[int(i)] if int(i) < len(visible) and visible != [""] else i for i in ids]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    if len(ids) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(ids))))
        sys.exit(_processes(len(ids)))


def _processes(world: int) -> int:
    """Run this command `world` times at once; when one fails the others are ended."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        common = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                  TOLD: Path(folder, "told")}
        running = [subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {
            key: str(value) for key, value in {**common, "RANK": r, "LOCAL_RANK": r}.items()})
            for r in range(world)]
        try:
            while any(p.poll() is None for p in running):
                if failed := [p.returncode for p in running if p.poll()]:
                    return failed[0] if failed[0] > 0 else 1
                time.sleep(0.1)
            return max(abs(p.returncode) for p in running)
        except KeyboardInterrupt:  # the terminal has told all of them
            return 130
        finally:
            for p in running:
                p.kill()
                p.wait()


def start(device: str = "auto", seed: int | None = None, threads: int = 0) -> torch.device:
    """Join the process group if torchrun started us, pick the device, seed every generator.

    Each process draws its own noise (seed + rank); the data order is common (`common.data`).
    """
    if threads:
        torch.set_num_threads(threads)
    has_cuda = torch.cuda.is_available()
    chosen = usable(("cuda" if has_cuda else "cpu") if device == "auto" else device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    if seed is not None:
        torch.manual_seed(seed + rank())
    return chosen


def usable(device: str) -> torch.device:
    """A device by name; UserError when this machine has none of it."""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device {device}: choose cpu, or cuda on a machine with a GPU")
    return torch.device(device)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch_size: int) -> int:
    """This process's part of a batch that is divided over all of them."""
    if batch_size < 1 or batch_size % world():
        raise UserError(f"a batch of {batch_size} cannot be shared by {world()} process(es): give "
                        "a multiple of their number")
    return batch_size // world()


def default_precision(device: torch.device | None = None) -> str:
    """bf16 where the hardware multiplies it, fp32 elsewhere."""
    if device is None or device.type == "cuda":
        if torch.cuda.is_available():
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    onednn = torch.backends.mkldnn.is_available()
    return "bf16" if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast for one forward pass; `precision` is "bf16", "fp32" or "auto"."""
    if precision == "auto":
        precision = default_precision(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works: on a CPU it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception:
        return False
    return True


def parallel(model: nn.Module, compile: bool = False) -> nn.Module:
    """The module to call for training: `model`, compiled and/or averaged over the processes.

    Quantiles stay out of the gradient average: their loss sees no data, so it is equal everywhere.
    """
    if compile and not agree(can_compile(next(model.parameters()).device)):
        compile = False
        if rank() == 0:
            print("torch.compile finds no working compiler here: training without --compile")
    net = torch.compile(model) if compile else model
    if world() == 1:
        return net
    names = [name for name, _ in model.named_parameters() if name.endswith("quantiles")]
    prefix = "_orig_mod." if compile else ""
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(net, [prefix + n for n in names])
    known = inspect.signature(ddp).parameters  # the name changed with torch 2.13
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return ddp(net, **{name: False})


# --------------------------------------------------------------------- optimisers, schedules
def main_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Everything but the quantiles of the entropy bottlenecks, by name."""
    return {n: p for n, p in model.named_parameters() if not n.endswith("quantiles")}


def optimizers(model: nn.Module, name: str, lr: float,
               aux_lr: float = 1e-3) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """(main, aux): everything but the quantiles, and the quantiles of the entropy bottlenecks.

    "adam" is every source's choice. "muon" (timm) orthogonalises the updates of the convolution
    kernels and uses AdamW at lr / 2 for the rest: fewer steps to the same loss.
    """
    main = main_parameters(model)
    aux = [p for n, p in model.named_parameters() if n.endswith("quantiles")]
    device = next(iter(main.values())).device
    graph = {"capturable": True} if device.type == "cuda" and world() == 1 else {}
    rate = torch.tensor(lr, device=device) if graph else lr  # a tensor: schedules may change it
    if name == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(main.values(), lr=rate, **graph)
    elif name == "muon":
        from timm.optim import Muon

        kernels = [p for n, p in main.items() if "entropy_bottleneck" not in n]
        density = [p for n, p in main.items() if "entropy_bottleneck" in n]
        groups = [{"params": kernels}, {"params": density, "use_fallback": True}]
        optimizer = Muon(groups, lr=rate, nesterov=True, fallback_lr_scale=0.5,
                         betas=(0.9, 0.999), **graph)
    else:
        raise UserError(f"--optimizer {name}: choose adam or muon")
    aux_rate = torch.tensor(aux_lr, device=device) if graph else aux_lr
    return optimizer, torch.optim.Adam(aux, lr=aux_rate, **graph)


def learning_rate(optimizer: torch.optim.Optimizer) -> float | Tensor:
    """That of the first group, as it is now: a copy, should it be a tensor on the GPU."""
    rate = optimizer.param_groups[0]["lr"]
    return rate.clone() if isinstance(rate, Tensor) else rate


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimiser on this device, whichever device its state was saved on."""
    own = [{key: group[key] for key in ("lr", "capturable") if key in group}
           for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, before in zip(optimizer.param_groups, own, strict=True):
        rate = float(group["lr"])
        tensor = isinstance(before["lr"], Tensor)
        group["lr"] = torch.full_like(before["lr"], rate) if tensor else rate
        if "initial_lr" in group and not tensor:
            group["initial_lr"] = float(group["initial_lr"])
        if "capturable" in before:
            group["capturable"] = before["capturable"]
        for p in group["params"]:  # a captured step counts on the GPU, any other on the CPU
            if isinstance(count := optimizer.state.get(p, {}).get("step"), Tensor):
                device = p.device if group.get("capturable") else "cpu"
                optimizer.state[p]["step"] = count.to(device)


def schedule(optimizer: torch.optim.Optimizer, name: str, epochs: int,
             milestones: Iterable[int], patience: int = 10) -> Any:
    """Learning-rate schedule, stepped once an epoch with the loss to watch.

    plateau: halve after `patience` epochs without progress; multistep: halve at each milestone;
    cosine: to zero over the run.
    """
    if name == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", factor=0.5,
                                                          patience=patience)
    if name == "multistep":
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones), gamma=0.5)
    if name == "constant":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    if name == "cosine":
        cosine = lambda epoch: 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / epochs)))  # noqa: E731
        return torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    raise UserError(f"--lr_schedule {name}: choose plateau, multistep, cosine or constant")


def agree(flag: bool) -> bool:
    """The first process's answer, on every process."""
    if world() == 1:
        return flag
    answer = [flag]
    dist.broadcast_object_list(answer)
    return answer[0]


def check_finite(values: dict[str, Tensor], step: int, last_good: Path | None) -> None:
    """Stop with a clear message when a loss term, a gradient or a weight is NaN or infinite.

    Does nothing while a CUDA graph is being recorded: of replayed steps `Log.step` looks at one in
    50, and no checkpoint is written of weights that are not finite.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    finite = torch.stack([value.isfinite() for value in values.values()])
    if not finite.all():  # one question to the GPU a step: each makes it wait for the CPU
        bad = [name for name, good in zip(values, finite.tolist(), strict=True) if not good]
        kept = f"the last good checkpoint is {last_good}" if last_good else "nothing was saved yet"
        raise UserError(f"{', '.join(bad[:5])} not finite in the batch of step {step}; {kept}; "
                        "try a smaller learning rate or --precision fp32")


# -------------------------------------------------------------------------------- checkpoints
def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write atomically: a full disk or a kill leaves the old file as it was."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write to a temporary file beside `path`, then rename; UserError when it cannot."""
    refuse_folder(path)
    name, path = path, Path(os.path.realpath(path))  # a link stays one
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():  # /dev/stdout, a pipe
            path.write_bytes(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = "; the file that was there is kept" if path.exists() else ""
        raise UserError(f"cannot write {name}: {e.strerror or e}{kept}") from None


def refuse_folder(path: str | Path) -> None:
    """UserError when a file is to be written where a folder is."""
    if Path(path).is_dir():
        raise UserError(f"cannot write {path}: it is a folder")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours, or a bare state dict (then under "model").

    `module.` and `_orig_mod.` prefixes of the keys are dropped. UserError when unreadable.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:  # torch.load does not look at the checksums
                if (part := parts.testzip()) is not None:
                    raise UserError(f"{path}: damaged ({part} has another checksum): copy it again")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path}: not a checkpoint that can be read: give one of train.py, or a "
                        "state dict (torch.save of tensors, no other objects)") from None
    except Exception as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"{path}: not a checkpoint that can be read, it is damaged or cut short "
                        f"({reason[:100]})") from None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: holds no state dict")
    if "model" not in state:
        names = ("state_dict", "network", "model_state_dict")
        other = {key: value for key, value in state.items() if key not in names}
        weights = next((state[key] for key in names if key in state), None)
        state = {"model": state} if weights is None else {"model": weights} | other
    weights = state["model"]
    if not isinstance(weights, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise UserError(f"{path}: holds no state dict")
    for prefix in ("module.", "_orig_mod."):
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    steps = state.pop("int8_steps", {})  # of a file of common/export.py
    if {k for k, v in weights.items() if v.dtype == torch.int8} != set(steps):
        raise UserError(f"{path}: the steps of its 8-bit kernels are missing: export it again")
    state["model"] = {k: v * steps[k] if k in steps else v.float() if v.is_floating_point() else v
                      for k, v in weights.items()}
    return state


def load_model(path: str | Path, kind: type, device: torch.device | str = "cpu",
               state: dict[str, Any] | None = None) -> nn.Module:
    """Build a `kind` from a checkpoint: eval mode, channels_last, coding tables ready.

    state: what `load_checkpoint(path)` gave, if at hand. Weights "averaged" over training are taken
    in place of the last ones.

    CDF tables and the fixed-point scales come from the file; only a bare state dict without them
    gets new ones. The checkpoint's other entries are left in `model.info`; those of its config that
    `kind.options` names, what the weights do not tell, go to `kind.from_state_dict`.
    """
    state = load_checkpoint(path) if state is None else state
    averaged = state.get("averaged")
    state = {**state, **(averaged if isinstance(averaged, dict) else {})}
    config = state["config"] = state.get("config") or {}
    options = {name: config[name] for name in getattr(kind, "options", ()) if name in config}
    try:
        model = kind.from_state_dict(state["model"], **options)
    except KeyError as e:
        raise UserError(f"{path}: not the weights of a {kind.__name__}: {e} is missing") from None
    except RuntimeError as e:
        raise UserError(f"{path}: not the weights of a {kind.__name__}: {reason(e)}") from None
    if any(name.endswith("_quantized_cdf") and b.numel() == 0 for name, b in model.named_buffers()):
        try:
            model.update(force=True)
        except ValueError:
            raise UserError(f"{path}: its densities are broken (NaN?), no CDF tables fit") from None
    for name, spec in state.get("exact", {}).items():
        exact.restore(model.get_submodule(name), spec)
    model.info = {k: state[k] for k in ("config", "step", "epoch", "hardware") if k in state}
    return model.eval().to(device, memory_format=torch.channels_last)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy a checkpoint's weights into `model`, strictly (--init_ckpt)."""
    state = load_checkpoint(path)
    for name in getattr(model, "options", ()):
        trained = (state.get("config") or {}).get(name)
        if trained is not None and trained != getattr(model, name):
            raise UserError(f"{path}: was trained with --{name} {trained}, not "
                            f"{getattr(model, name)}")
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, KeyError) as e:  # KeyError: of CompressAI's tables
        raise UserError(f"{path}: not weights of this model: {reason(e)}") from None


def reason(e: Exception) -> str:
    """The keys that torch complains of, on one line; its first line is a heading."""
    lines = [line.strip() for line in str(e).splitlines()]
    return " ".join(lines[1:] or lines)[:300]


def coding_state(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint needs so that files written with it can be decoded for ever."""
    return {"model": model.state_dict(),
            "exact": {name: exact.spec(model.get_submodule(name)) for name in model.exact_parts}}


SAME_RUN = ("metric", "lmbda", "optimizer", "lr", "aux_lr", "lr_schedule", "milestones",
            "batch_size", "patch_size", "flip", "images", "steps_per_epoch", "seed",
            "clip_max_norm")  # what --resume must not change


class Checkpoints:
    """The checkpoints of one run: epoch_<n>.pth after epochs, latest.pth in between.

    `parts` are everything with state: {"model": ..., "optimizer": ..., "scheduler": ...}.
    """

    own = ("log",)  # parts that each process has of its own, kept beside its random generators

    def __init__(self, folder: Path, parts: dict[str, Any], config: dict[str, Any],
                 same: tuple[str, ...] = SAME_RUN,
                 anew: str = "--init_ckpt and another --exp_version"):
        """same: the flags that --resume must not change; anew: what starts another run instead."""
        self.folder, self.parts, self.config, self.same = folder, parts, config, same
        self.anew = anew
        self.last: Path | None = None

    def begin(self, resume: bool, epoch: int | None) -> dict[str, Any]:
        """Restore the newest checkpoint (`resume`) or that of `epoch`; {} when the run is new.

        Refuses to start a new run in a folder that holds another: nothing is overwritten.
        """
        if epoch is not None:
            return self.resume(self.folder / f"epoch_{epoch}.pth")
        found = self._by_age()
        if found and not resume:
            raise UserError(f"{self.folder} holds the checkpoints of a run: continue it with "
                            f"--resume, or start another: {self.anew}")
        if found:
            return self.resume(found[-1])
        if rank() == 0:
            text = yaml.safe_dump(self.config, sort_keys=False)
            write_atomic(self.folder / "config.yaml", text.encode())
        return {}

    def save(self, name: str, epoch: int, step: int, **extra: Any) -> None:
        """Save after `step` steps, in (or at the end of) `epoch`. All processes must call it."""
        self.update_tables(step)
        generators: list[Any] = [None] * world()
        mine = {"cpu": torch.get_rng_state()}
        mine |= {key: self.parts[key].state_dict() for key in self.own if key in self.parts}
        if torch.cuda.is_available():
            mine["cuda"] = torch.cuda.get_rng_state()
        if world() > 1:
            dist.all_gather_object(generators, mine)
        else:
            generators = [mine]
        if rank() == 0:
            state = {key: part.state_dict() for key, part in self.parts.items() if key != "model"}
            save_checkpoint(self.folder / name, {
                **coding_state(self.parts["model"]), **state, **extra, "epoch": epoch, "step": step,
                "rng": generators, "config": self.config,
                "hardware": describe(next(self.parts["model"].parameters()).device)})
        self.last = self.folder / name

    def update_tables(self, step: int, settle: bool = False) -> None:
        """CDF tables that fit the weights after `step` steps; `settle`: solve for the quantiles.

        UserError when the weights are not finite or so large that there are no such tables.
        """
        model = self.parts["model"]
        peaks = {name: p.detach().abs().max() for name, p in model.named_parameters()}
        check_finite(peaks, step - 1, self.last)
        try:
            model.update(force=True, update_quantiles=settle)
        except ValueError:  # the densities overflow
            check_finite({"CDF tables": torch.tensor(math.nan)}, step - 1, self.last)

    def resume(self, path: Path) -> dict[str, Any]:
        """Restore every part and this process's random generators; returns the checkpoint."""
        state = load_checkpoint(path)
        missing = [key for key in (*self.parts, "step", "rng") if key not in state]
        if missing:
            raise UserError(f"{path}: cannot be resumed, it has no {', '.join(missing)} "
                            f"(start another run from its weights: {self.anew})")
        mine = state["rng"][min(rank(), len(state["rng"]) - 1)]
        same = [*self.same, *getattr(self.parts["model"], "options", ())]
        if self.config.get("lr_schedule") == "cosine":
            same += ["epoch", "epochs"]  # the whole schedule depends on it
        for key in same:
            before, now = state["config"].get(key), self.config.get(key)
            if before != now:
                flag = "dataset" if key == "images" else key
                raise UserError(f"{path}: was trained with --{flag} {before}, not {now} (to start "
                                f"another run from its weights: {self.anew})")
        try:
            for key, part in self.parts.items():
                saved = mine[key] if key in mine else state[key]
                if isinstance(part, torch.optim.Optimizer):
                    load_optimizer(part, saved)
                else:
                    part.load_state_dict(saved)
                if hasattr(part, "base_lrs") and isinstance(learning_rate(part.optimizer), float):
                    part.base_lrs = [float(rate) for rate in part.base_lrs]  # of a GPU: tensors
        except (RuntimeError, ValueError, KeyError) as e:
            raise UserError(f"{path}: not a checkpoint of this configuration "
                            f"({reason(e)})") from None
        torch.set_rng_state(mine["cpu"])
        if "cuda" in mine and torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["cuda"])
        self.last = path
        return state

    def _by_age(self) -> list[Path]:
        """Oldest first. Steps would mislead: --load_model_epoch leaves later epochs behind."""
        found = [*self.folder.glob("latest.pth"), *epochs(self.folder)]
        return sorted(found, key=lambda p: p.stat().st_mtime_ns)


def epochs(folder: Path) -> list[Path]:
    """The epoch_<n>.pth of a run, by n; copies with other names are not among them."""
    found = [p for p in folder.glob("epoch_*.pth") if re.fullmatch(r"epoch_\d+", p.stem)]
    return sorted(found, key=lambda p: int(p.stem.split("_")[1]))


# --------------------------------------------------------------------------------------- logs
class Log:
    """log.txt, TensorBoard and the progress bar of one run; silent on all ranks but the first."""

    def __init__(self, folder: Path, steps: int, quiet: bool = False):
        self.folder, self.steps, self.quiet = folder, steps, quiet
        self.active = rank() == 0
        self.sums: dict[str, float] = {}
        self.on_gpu: dict[tuple[str, ...], Tensor] = {}  # sums that nobody has read yet, by names
        self.count = 0

    def begin(self, first: int = 0) -> None:
        """Open the files and the bar, `first` steps being done already."""
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        self.board = SummaryWriter(str(self.folder))
        self.file = open(self.folder / "log.txt", "a")
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=self.steps, initial=first, unit="step", dynamic_ncols=True,
                        mininterval=1 if terminal else 60, disable=self.quiet)

    def step(self, step: int, values: dict[str, Any], every: int = 50) -> None:
        """Count one step; every `every` steps, write the scalars to TensorBoard."""
        there = {k: v.detach() for k, v in values.items() if isinstance(v, Tensor) and v.is_cuda}
        if there:  # reading them now would make the GPU wait
            new = torch.stack(list(there.values())).double()
            before = self.on_gpu.get(tuple(there))
            self.on_gpu[tuple(there)] = new if before is None else before + new
        self._add({k: v.item() if isinstance(v, Tensor) else v for k, v in values.items()
                   if k not in there})
        self.count += 1
        if self.active:
            self.bar.update()
            if step % every == 0:
                values = {k: v.item() if isinstance(v, Tensor) else v for k, v in values.items()}
                bad = [k for k, v in values.items() if not math.isfinite(v)]
                if bad:
                    raise UserError(f"{', '.join(bad)} not finite at step {step}; the newest "
                                    "checkpoint is from before; try a smaller learning rate or "
                                    "--precision fp32")
                self.scalars("train", values, step)
                self.bar.set_postfix(loss=f"{values['loss']:.3f}", bpp=f"{values['bpp']:.3f}")

    def _add(self, values: dict[str, float]) -> None:
        for k, v in values.items():
            self.sums[k] = self.sums.get(k, 0.0) + v

    def _fetch(self) -> None:
        """Bring what has been summed up on the GPU."""
        for names, sums in self.on_gpu.items():
            self._add(dict(zip(names, sums.tolist(), strict=True)))
        self.on_gpu = {}

    def state_dict(self) -> dict[str, Any]:
        """The sums of an unfinished epoch: a resumed run reports the same means."""
        self._fetch()
        return {"sums": self.sums, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.count = dict(state["sums"]), state["count"]

    def means(self) -> dict[str, float]:
        """Means of all step values since the last call (equal on every process)."""
        if not self.count:
            return {}
        self._fetch()
        result = {k: v / self.count for k, v in self.sums.items()}
        if world() > 1:
            values = torch.tensor(list(result.values()), dtype=torch.float64)
            if dist.get_backend() == "nccl":
                values = values.cuda()
            dist.all_reduce(values)
            result = dict(zip(result, (values / world()).tolist(), strict=True))
        self.sums, self.count = {}, 0
        return result

    def scalars(self, tag: str, values: dict[str, float], step: int) -> None:
        if self.active:
            for key, value in values.items():
                self.board.add_scalar(f"{tag}/{key}", value, step)

    def images(self, x: Tensor, x_hat: Tensor, step: int) -> None:
        """Original and reconstruction side by side, (3, H, W) each."""
        if self.active:
            pair = torch.cat([x.float().cpu(), x_hat.float().cpu().clamp(0, 1)], dim=-1)
            self.board.add_image("reconstruction", pair, step)

    def line(self, text: str) -> None:
        """One line to log.txt and above the progress bar."""
        if self.active:
            if not self.quiet:
                self.bar.write(text, file=sys.stdout)
            self.file.write(text + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.board.close()
            self.file.close()


def describe(device: torch.device) -> str:
    """The hardware in words, for results and checkpoints."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = "CPU"
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x for x in lines if x.startswith("model name")).split(":")[1].strip()
    return f"{name}, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------------ argparse types
def _number(name: str, kind: type, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A type for argparse, which gives its name in error messages; NaN holds nothing."""
    def parse(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise ValueError(text)
        return value

    parse.__name__ = name
    return parse


positive_float = _number("positive_float", float, lambda v: 0 < v <= 1e30)  # float32 holds it
number = _number("number", float, lambda v: 0 <= v <= 1e30)  # 0 or more
positive_int = _number("positive_int", int, lambda v: v > 0)
count = _number("count", int, lambda v: v >= 0)
minutes = _number("minutes", float, lambda v: v >= 0)
threads = _number("threads", int, lambda v: 0 <= v <= 1024)  # 0 leaves it to torch
seed_number = _number("seed_number", int, lambda v: -(2**63) <= v < 2**63)  # a generator's range
