"""Settings and small images shared by the tests."""

import faulthandler
import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per worker, in the processes it starts, too
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads of the tests with two sleep

import common  # noqa: E402, F401  (first: CompressAI and timm load what is used)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(min(2, torch.get_num_threads()))  # tensors here are too small for more
LIMIT = 600  # seconds


def pytest_collection_modifyitems(items):
    """Run the longest file first, beside all others; skip tests marked `gpu` without a GPU."""
    items.sort(key=lambda item: item.path.name != "test_machines.py")
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """A test that takes ten minutes, with a set-up that others share, waits for ever: it fails."""
    def expired(*_):
        faulthandler.dump_traceback(all_threads=True)
        pytest.fail(f"took more than {LIMIT} s")

    signal.signal(signal.SIGALRM, expired)
    signal.alarm(LIMIT)
    try:
        return (yield)
    finally:
        signal.alarm(0)


@pytest.fixture
def tiny_image():
    """A 48x64 uint8 photograph-like image (3, H, W): smooth colours, an edge and a little noise."""
    sides = torch.linspace(0, 1, 48), torch.linspace(0, 1, 64)
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    image = torch.stack([rows, columns, (rows + columns) / 2])
    image[:, 16:32, 20:44] = 1 - image[:, 16:32, 20:44]
    image += 0.02 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return (255 * image.clamp(0, 1)).round().to(torch.uint8)
