"""What every paper's folder shares: data, losses, metrics, entropy coding, evaluation.

Scripts import `common` before anything else: the two settings below must be in place before the
first large tensor is allocated and before anything imports torchvision.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from importlib.machinery import PathFinder

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # <malloc.h>


class UserError(Exception):
    """A mistake the user can repair: one line saying what is wrong and what to do about it."""


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor.

    By default it returns each large activation to the kernel when it is freed, and the next
    iteration pays for zeroed pages again: 1.6x on training on a CPU. The price is a process that
    stays at its peak size. LIC_DEFAULT_MALLOC=1 leaves the allocator alone, to measure this.
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


def _allow_torchvision():
    """Make `import torchvision` work where its compiled operators cannot load.

    On Linux the torchvision of PyPI is built for CUDA. Beside a CPU-only torch its library does not
    load, and the import stops at "operator torchvision::nms does not exist". CompressAI imports it
    for image reading only, so declaring the two operators without a body is enough. A torchvision
    that matches its torch is left alone and keeps its real operators.
    """
    if sys.platform != "linux" or "torchvision" in sys.modules:
        return None
    import torch

    package = PathFinder.find_spec("torchvision")
    if torch.version.cuda or torch.version.hip or package is None:
        return None
    extension = PathFinder.find_spec("_C", package.submodule_search_locations)
    try:  # what torchvision itself does first; loading the same library twice is harmless
        if extension is not None:
            torch.ops.load_library(extension.origin)
    except (ImportError, OSError):
        pass
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_keep_freed_memory()
_torchvision_operators = _allow_torchvision()  # the declarations live as long as this object
