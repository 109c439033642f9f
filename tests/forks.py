"""Python processes that start in milliseconds.

Importing torch, its compiler and matplotlib takes several seconds. A parent process does so once,
and each command runs in a fork of it, as if it had been started by `python SCRIPT ...`. The parent
has a single thread and does nothing but these imports.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = (  # common first: it makes CompressAI and timm load what is used, and torchvision work
    "common", "common.coding.codec_cli", "common.training.run", "common.evaluation.evaluate",
    "common.recipes.report", "torch._dynamo", "torch.utils.tensorboard", "matplotlib.pyplot",
    "bjontegaard", "scipy.stats.distributions")
FEW_IMPORTS = "common", "common.coding.codec_cli"  # of a parent that runs few commands


class Process:
    """A running command with the methods of subprocess.Popen that the tests need."""

    def __init__(self, parent, words, cwd, environment):
        self._parent = parent
        folder = tempfile.mkdtemp()
        self._files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        self.args = [str(word) for word in words]
        self.returncode = None
        self.pid = parent.ask(words=self.args, cwd=str(cwd), environment=environment,
                              files=self._files)

    def poll(self):
        if self.returncode is None:
            self.returncode = self._parent.ask(pid=self.pid)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def first_line(self, timeout=60):
        """Wait for the first line on stdout and return it."""
        deadline = time.monotonic() + timeout
        while True:
            over = self.poll() is not None or time.monotonic() > deadline
            file = Path(self._files[0])
            text = file.read_text() if file.exists() else ""
            if "\n" in text:
                return text.splitlines()[0]
            assert not over, self.communicate()
            time.sleep(0.01)

    def kill(self):
        self.send_signal(signal.SIGKILL)
        self.communicate()

    def communicate(self, timeout=600):
        """Wait for the end; return what was written to stdout and stderr."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        written = tuple(Path(file).read_text() for file in self._files)
        shutil.rmtree(os.path.dirname(self._files[0]))
        return written


class Parent:
    """The process that has imported IMPORTS; FEW_IMPORTS if it has an `environment` of its own."""

    def __init__(self, root, environment):
        imports = FEW_IMPORTS if environment else IMPORTS
        self._process = subprocess.Popen(
            [sys.executable, __file__, *imports], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
                              "MPLBACKEND": "agg", "PYTHONPATH": str(root)} | environment)
        atexit.register(self._process.communicate)  # at the end of its input, it ends

    def ask(self, **request):
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@functools.cache
def _parent(root, environment):
    return Parent(root, dict(environment))


def start(*words, cwd, root=ROOT, environment=None, libraries=None):
    """Start `python WORDS...`: a script, -m and a module, or -c and code; then flags.

    root: folder that `common` and the papers are imported from; environment: variables of the
    command; libraries: variables that a library reads when it is loaded, or only once.
    """
    parent = _parent(root, tuple((libraries or {}).items()))
    return Process(parent, words, cwd, environment or {})


def run(*words, status=0, **options):
    """Run `python WORDS...` to its end; return stdout and stderr."""
    process = start(*words, **options)
    output, errors = process.communicate()
    assert process.returncode == status, errors[-2000:]
    return output, errors


def run_ranks(count, *words, **options):
    """Run the `count` processes of one run, with the variables that torchrun would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(*words, **options, environment={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for rank in range(count)]
    try:
        while any(process.poll() is None for process in ranks):
            assert not any(process.poll() for process in ranks)  # one has failed
            time.sleep(0.01)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        said = [process.communicate()[1][-2000:] for process in ranks]
        print(*said, sep="\n", file=sys.stderr)  # pytest shows it if the test fails
    assert not any(process.returncode for process in ranks)


# --------------------------------------------------------------------------- the parent process
def _serve():
    """Answer requests: start a command -> its process id; its id -> None, or its exit status."""
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            return request
    return None


def _become(words, cwd, environment, files):
    """Run a command in this process, as the interpreter would."""
    for number, name in enumerate((os.devnull, *files)):
        opened = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[0] = os.getcwd()  # instead of the folder of this file
    sys.argv = words[1:] if words[0] == "-m" else words
    if words[0] == "-c":
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        script = os.path.abspath(words[0])
        sys.path[0] = os.path.dirname(script)
        runpy.run_path(script, run_name="__main__")


def _exit_status(run):
    """Call `run`; return what the exit status of the interpreter would be after it."""
    try:
        run()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for _name in sys.argv[1:]:
        importlib.import_module(_name)
    gc.freeze()  # so that forks share the pages of what is there
    if _command := _serve():
        _status = _exit_status(lambda: _become(**_command))
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)  # without the second that torch takes to be taken down
