"""Make the environment .venv with the pinned packages; `make setup` runs this file.

    python3 common/install.py [--torch cpu] [--uv] [--dev] [--demo] [--notebooks]

It needs Python 3.10 or newer and nothing else, as no package is installed yet. What is there
already is kept, so that an interrupted installation goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
SUPPORTED = ((3, 10), (3, 14))  # the oldest and the newest Python
PYTORCH = "https://download.pytorch.org/whl/"  # PyTorch's own index has one folder for each build
BUILDS = r"cpu|cu\d+|rocm[\d.]+|xpu"
GET_COMPILER = ("on Debian and Ubuntu `apt install g++ python3-dev`, on Fedora `dnf install "
                "gcc-c++ python3-devel`, on macOS `xcode-select --install`, on Windows the Build "
                "Tools for Visual Studio with \"Desktop development with C++\"")
HERE = (f"Python {sys.version_info[0]}.{sys.version_info[1]} on {platform.system()} "
        f"{platform.machine()}")
NETWORK = re.compile(r"Retrying \(|ConnectionError|Max retries|[Tt]imed? ?out|name resolution|"
                     r"error sending request|dns error")  # in the words of pip and of uv


class Failed(Exception):
    """One line that says what is wrong, and what to do before `make setup` is called again."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make .venv with the pinned packages.")
    parser.add_argument("--torch", default="", help="build of torch from PyTorch's own index, cpu "
                        "or cu126 for example; the one of pip's index if not given")
    parser.add_argument("--uv", action="store_true", help="install with uv in place of pip")
    parser.add_argument("--dev", action="store_true", help="only add what tests and lint need")
    parser.add_argument("--demo", action="store_true", help="only add Gradio")
    parser.add_argument("--notebooks", action="store_true", help="only add Jupyter")
    args = parser.parse_args(argv)
    try:
        check(args.torch, args.uv)
        install = Installer(args.uv)
        if more := [name for name in ("dev", "demo", "notebooks") if getattr(args, name)]:
            for name in more:  # with the versions that are installed already
                install.packages("-r", f"requirements-{name}.txt", "-c", "requirements.txt")
            return
        make_environment()
        install_compressai(install)
        announce(args.torch)
        if args.torch:
            # That index has all packages of its own builds, but few versions of numpy and Pillow,
            # which are all that torchvision for CPUs needs besides torch: they come next.
            alone = ["--no-deps"] if args.torch == "cpu" else []
            install.packages(*alone, "--index-url", PYTORCH + args.torch,
                             *requirements("torch", "torchvision"))
        install.packages("-r", "requirements.txt")
        install.packages("--no-deps", "--no-build-isolation", "-e", ".")
        try_imports()
    except Failed as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def check(build: str, uv: bool) -> None:
    """Refuse what cannot work before anything is downloaded."""
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        raise Failed(f"{sys.executable} is Python {platform.python_version()}, but "
                     f"{version_range()} is needed; name one: make setup PYTHON=python3.12")
    if build and not re.fullmatch(BUILDS, build):
        raise Failed(f"TORCH={build}: not a build of torch; choose cpu, cu126 or another folder of "
                     f"{PYTORCH}")
    if uv and not shutil.which("uv"):
        raise Failed("UV=1: there is no uv (`pip install uv` brings it); or leave UV=1 out")


def version_range() -> str:
    return " to ".join(f"{major}.{minor}" for major, minor in SUPPORTED)


def make_environment() -> None:
    """Create .venv unless it is there, can run pip and has a supported Python."""
    code = "import sys, pip; print(*sys.version_info[:2])"
    probe = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True) \
        if PYTHON.exists() else None
    if probe and probe.returncode == 0:
        have = tuple(map(int, probe.stdout.split()))
        if SUPPORTED[0] <= have <= SUPPORTED[1]:
            if have != sys.version_info[:2]:
                print(f"note: {VENV.name} has Python {have[0]}.{have[1]} and keeps it; to change "
                      "it, run `make clean` first", flush=True)
            return
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if made.returncode:
        raise Failed(f"`{sys.executable} -m venv` failed ({last_line(made.stdout)}); on Debian and "
                     "Ubuntu: apt install python3-venv")


class Installer:
    """Installs packages into .venv with pip, or with uv."""

    def __init__(self, uv: bool):
        # Without --no-compile, pip spends most of its time on byte code; Python writes that of the
        # modules in use when it imports them. CompressAI's stale requirements are not worth a
        # warning.
        self.command = ["uv", "pip", "install", "--python", str(PYTHON)] if uv else [
            str(PYTHON), "-m", "pip", "install", "--no-compile", "--no-warn-conflicts",
            "--disable-pip-version-check"]

    def packages(self, *words: str) -> None:
        """Install, showing the progress; Failed says why it did not work."""
        errors = self.run(*words)
        if errors is not None:
            raise Failed(reason(errors))

    def run(self, *words: str, show: bool = True) -> str | None:
        """None if the packages are installed, or what pip wrote on stderr."""
        with subprocess.Popen([*self.command, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                              stdout=None if show else subprocess.DEVNULL) as process:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:  # while stdout, with its progress bar, stays the terminal's
                lines.append(line)
                if show:
                    print(line, end="", file=sys.stderr, flush=True)
        return "".join(lines) if process.returncode else None


def reason(errors: str) -> str:
    """One line for what pip or uv wrote on stderr."""
    again = "the same command then goes on from here"
    if "No space left" in errors:
        return f"the disk is full: make room (CUDA's torch takes 6 GB); {again}"
    if NETWORK.search(errors):
        return ("the package index cannot be reached: check the network, or name a mirror with "
                f"PIP_INDEX_URL; {again}")
    if found := re.search(r"No matching distribution found for (\S+)", errors):
        return (f"there is no {found[1]} for {HERE} in your pip's index: try another Python, "
                f"{version_range()}, with `make clean setup PYTHON=python3.12`")
    return f"packages were not installed ({last_line(errors)}); {again}"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"


def install_compressai(install: Installer) -> None:
    """Install CompressAI, from its wheel or with a compiler; first, as it is the first to fail."""
    words = "--no-deps", "-r", "requirements-nodeps.txt"
    errors = install.run("--only-binary", ":all:", *words, show=False)
    if errors is None:
        return
    if NETWORK.search(errors) or "No space left" in errors:
        raise Failed(reason(errors))
    if fault := compiler_fault():
        raise Failed(f"CompressAI has no wheel for {HERE}, and there is no C++17 compiler with "
                     f"Python's headers to build it ({fault}): {GET_COMPILER}; or take Python 3.12 "
                     "on Linux x86-64 or macOS")
    print(f"CompressAI has no wheel for {HERE}: compiling it takes a minute.", flush=True)
    errors = install.run(*words)
    if errors is not None:
        raise Failed(reason(errors))


def compiler_fault() -> str:
    """Why an extension module cannot be compiled here; an empty string if it can."""
    if os.name == "nt":
        tools = Path(os.environ.get("ProgramFiles(x86)", ""), "Microsoft Visual Studio/Installer")
        return "" if shutil.which("cl") or (tools / "vswhere.exe").exists() else "no Visual C++"
    wanted = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    command = shlex.split(wanted)
    if not shutil.which(command[0]):
        return f"no {command[0]}"
    source = "#include <Python.h>\n#include <optional>\nstd::optional<int> nothing;\n"
    command += ["-std=c++17", "-fsyntax-only", "-I", sysconfig.get_path("include"), "-x", "c++"]
    done = subprocess.run([*command, "-"], input=source, text=True, capture_output=True)
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    return "" if done.returncode == 0 else last_line("\n".join(lines[:1]) or done.stderr)


def requirements(*names: str) -> list[str]:
    """The lines of requirements.txt for these packages."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line.partition("==")[0] in names]


def announce(build: str) -> None:
    """Say what will be downloaded, unless torch is there already."""
    wanted = requirements("torch")[0]
    code = "import importlib.metadata as m; print('torch==' + m.version('torch').split('+')[0])"
    have = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True).stdout.strip()
    if have == wanted:
        return
    large = (sys.platform, platform.machine()) == ("linux", "x86_64") and build != "cpu"
    print(f"Installing into {VENV.name}: {wanted}, "
          + (f"PyTorch's {build} build" if build else "the build in your pip's index")
          + (" (on Linux PyPI's is for CUDA, 2.9 GB to download; TORCH=cpu takes one of 0.2 GB)"
             if large and not build else "")
          + ", and 0.2 GB of other packages.", flush=True)


def try_imports() -> None:
    """Fail now, in one line, if a package is damaged or does not match the others."""
    done = subprocess.run([PYTHON, "-c", "import common, torch, compressai.ans, timm.layers"],
                          capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"the packages are installed but do not work ({last_line(done.stderr)}): run "
                     "`make clean setup`")


if __name__ == "__main__":
    main()
