"""Processes and devices: --gpu_id, torchrun, the rank of a process, and its hardware."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from common import UserError

import torch
import torch.distributed as dist

PRECISIONS = ("bf16", "fp32")
NO_MEMORY = re.compile(  # texts of torch's RuntimeErrors
    r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED|bad_alloc|"
    r"out of shared memory|insufficient shared memory|killed by signal: Killed")
PATIENCE = timedelta(hours=2)  # for which processes wait for one another: images may be many
TOLD = "LIC_ERROR_TOLD"  # path of a file that the first process to report an error creates


def launch(gpu_ids: str) -> None:
    """Start one process per GPU index of --gpu_id, e.g. '0 1 2', as torchrun does.

    Without a GPU, the same number of processes runs on the CPU (gloo). The function returns in the
    worker processes only; the process that started them exits with the status of the first worker
    that fails.
    """
    ids = gpu_ids.replace(",", " ").split()
    if not ids or not all(i.isdigit() for i in ids):
        raise UserError(f"--gpu_id '{gpu_ids}': give GPU numbers separated by spaces, as '0 1 2'")
    if "RANK" in os.environ:
        return
    if len(ids) > 1 and interactive():  # the workers would run the command line of the notebook
        raise UserError(f"--gpu_id '{gpu_ids}': a notebook or an interactive session cannot start "
                        "several processes; run the script in a terminal (in a notebook: !python "
                        "train.py ...), or name one GPU")
    if gpu_ids != "0":  # indexes refer to CUDA_VISIBLE_DEVICES where a cluster has set it
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [visible[int(i)] if int(i) < len(visible) and visible != [""] else i for i in ids]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    if len(ids) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(ids))))
        sys.exit(_run_processes(len(ids)))


def _run_processes(world: int) -> int:
    """Run this command in `world` processes; when one fails, the others are stopped."""
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
                    if failed[0] == -signal.SIGKILL:
                        print("error: a process was killed, probably because memory ran out: train "
                              "with a smaller batch, smaller patches or fewer processes",
                              file=sys.stderr, flush=True)
                    return failed[0] if failed[0] > 0 else 1
                time.sleep(0.1)
            return max(abs(p.returncode) for p in running)
        except KeyboardInterrupt:  # the terminal has interrupted all of them
            return 130
        finally:
            for p in running:
                p.kill()
                p.wait()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the CPU, a GPU or a loader process has no memory left."""
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(str(error)))


def start(device: str = "auto", seed: int | None = None, threads: int = 0, jobs: int = 1
          ) -> torch.device:
    """Join the process group if torchrun started this process, choose the device and set the seed.

    jobs: number of processes that run this command on the CPU; the function returns in them only.
    Each process draws its own noise (seed + rank); the order of the data is common to all
    (`common.data`).
    """
    if jobs > 1 and "RANK" not in os.environ:
        _start_jobs(device, threads, jobs)
    if threads:
        torch.set_num_threads(threads)
    has_cuda = torch.cuda.is_available()
    chosen = parse_device(("cuda" if has_cuda else "cpu") if device == "auto" else device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if chosen.index >= (count := torch.cuda.device_count()):
            raise UserError(f"there is no GPU for process {chosen.index + 1}, only {count}: start "
                            "as many processes")
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    if seed is not None:
        torch.manual_seed(seed + rank())
    return chosen


def _start_jobs(device: str, threads: int, jobs: int) -> NoReturn:
    """Run this command in `jobs` processes on the CPU, and exit with their status."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        raise UserError(f"--jobs {jobs}: its processes share the CPU; add --device cpu, or start "
                        "one process per GPU with torchrun")
    if interactive():
        raise UserError(f"--jobs {jobs}: a notebook or an interactive session cannot start "
                        "several processes; run the script in a terminal")
    share = threads or max(1, (os.cpu_count() or 1) // jobs)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    sys.exit(_run_processes(jobs))


def cores() -> int:
    """The number of CPU cores that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)  # Linux
    return len(usable(0)) if usable else os.cpu_count() or 1


def interactive() -> bool:
    """Whether this is a notebook or an interactive session."""
    return not hasattr(sys.modules["__main__"], "__file__") or "ipykernel" in sys.modules


def cuda_or_cpu(cuda: bool, device: str) -> str:
    """Device of a script with the source's flag --cuda, which means the CPU where no GPU is."""
    if cuda and not torch.cuda.is_available():
        if os.environ.get("RANK", "0") == "0":
            print("note: --cuda: there is no GPU here, so the CPU is used", flush=True)
        return "cpu"
    return "cuda" if cuda else device


def parse_device(device: str) -> torch.device:
    """Return the device of this name; UserError if this machine does not have it."""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device {device}: choose cpu, or cuda on a machine with a GPU")
    return torch.device(device)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def per_process_batch(batch_size: int) -> int:
    """Number of images per process in a batch that is divided over all processes."""
    if batch_size < 1 or batch_size % world():
        raise UserError(f"a batch of {batch_size} cannot be shared by {world()} process(es): give "
                        "a multiple of their number")
    return batch_size // world()


def broadcast_flag(flag: bool) -> bool:
    """Return the flag of the first process on every process."""
    if world() == 1:
        return flag
    answer = [flag]
    dist.broadcast_object_list(answer)
    return answer[0]


def first_does(work: Callable[[], None]) -> None:
    """Let the first process do `work` while the others wait; a UserError is raised in all."""
    problem: list[str | None] = [None]
    if rank() == 0:
        try:
            work()
        except UserError as e:
            problem = [str(e)]
    if world() > 1:
        dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise UserError(problem[0])


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_hardware(device: torch.device) -> str:
    """Describe the hardware in words, for results and checkpoints."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = "CPU"
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x for x in lines if x.startswith("model name")).split(":")[1].strip()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"
