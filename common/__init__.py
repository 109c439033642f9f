"""Code shared by all papers: data, losses, metrics, entropy coding, training and evaluation.

Scripts import `common` before anything else: the settings below must be in place before the first
large tensor is allocated and before anything imports CompressAI, timm or torchvision.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from importlib.machinery import PathFinder

from common import lazy_packages
from common.installed import NotInstalled, fault

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # <malloc.h>


class UserError(Exception):
    """An error that the user can correct: one line states the problem and its remedy."""


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor.

    By default, glibc returns each large activation to the kernel when it is freed, and the next
    iteration has to obtain zeroed pages again. Keeping the memory makes training on a CPU 1.6 times
    faster, but the process stays at its peak size. LIC_DEFAULT_MALLOC=1 leaves the allocator
    unchanged, to measure this effect.
    """
    if platform.libc_ver()[0] != "glibc" or os.environ.get("LIC_DEFAULT_MALLOC") == "1":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 1 << 28)


def _declare_torchvision_operators() -> None:
    """Make `import torchvision` work where its compiled operators cannot load.

    On Linux, the torchvision of PyPI is built for CUDA. With a CPU-only torch its library does not
    load, and the import fails with "operator torchvision::nms does not exist". CompressAI and timm
    use it for image transforms and layers only, so it is enough to declare the two operators
    without an implementation. A torchvision that matches its torch keeps its real operators.
    """
    if sys.platform != "linux":
        return
    import torch

    package = PathFinder.find_spec("torchvision")
    if torch.version.cuda or torch.version.hip or package is None:
        return
    extension = PathFinder.find_spec("_C", package.submodule_search_locations)
    try:  # torchvision does this first, too; loading a library twice is harmless
        if extension is not None:
            torch.ops.load_library(extension.origin)
    except (ImportError, OSError):
        pass
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declarations.append(library)


if text := fault():
    if sys.argv[:1] == ["-m"]:  # python -m common...: nobody can catch the exception
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    raise NotInstalled(text)
_declarations: list[object] = []  # kept alive: with a library, its operators would go
_keep_freed_memory()
lazy_packages.install(prepare={"torchvision": _declare_torchvision_operators})
