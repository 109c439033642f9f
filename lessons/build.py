"""Execute the lessons and write each as a notebook (.ipynb) and as a page (.html), next to it.

    python lessons/build.py                 all lessons and their solutions (`make notebooks`)
    python lessons/build.py 3 6             two of them
    SHORT=1 python lessons/build.py         with small images and a few steps, to try it
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

from common import UserError, cli
from common.files import write_atomic

LESSONS = Path(__file__).resolve().parent
NEEDED = ("jupytext", "nbformat", "nbclient", "nbconvert", "ipykernel")


def sources(numbers: list[int]) -> list[Path]:
    """The lessons with these numbers, each followed by its solutions; all if there are none."""
    found = sorted(LESSONS.glob("[0-9]_*.py"))
    known = sorted({int(path.name[0]) for path in found})
    if unknown := sorted({*numbers} - {*known}):
        raise UserError(f"there is no lesson {unknown[0]}: choose from "
                        f"{', '.join(map(str, known))}")
    return [path for path in found if not numbers or int(path.name[0]) in numbers]


def build(source: Path, folder: Path) -> None:
    """Execute one lesson and write its notebook and its page to `folder`.

    Raises UserError, after the notebook was written as far as it got, if a cell fails.
    """
    import jupytext
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    notebook = jupytext.read(source)
    problem, client = "", None
    try:
        with tempfile.TemporaryDirectory() as sockets:
            # sockets in a folder instead of ports, which may be taken or forbidden
            os.environ["JUPYTER_RUNTIME_DIR"] = sockets
            transport = {"transport": "ipc", "ip": f"{sockets}/kernel"}
            client = NotebookClient(notebook, timeout=None, kernel_name="python3",
                                    config=Config({"ConnectionFileMixin": transport}),
                                    resources={"metadata": {"path": str(LESSONS)}})
            client.execute()
    except CellExecutionError as e:
        problem = f"{e.ename}: {e.evalue}"
    except DeadKernelError:
        problem = "its Python process died, perhaps for want of memory"
    except (OSError, RuntimeError) as e:  # no socket, no kernel
        problem = f"no Python process could be started for it: {e}"
    if client is not None:  # the process is gone; nbclient would look for it at the end
        atexit.unregister(client._cleanup_kernel)
    target = folder / source.with_suffix(".ipynb").name
    write_atomic(target, nbformat.writes(notebook).encode())
    if problem:
        raise UserError(f"{source.name}: {' '.join(problem.split())}; {target} shows where")
    page, _ = HTMLExporter().from_notebook_node(
        notebook, {"metadata": {"name": source.stem}})
    write_atomic(target.with_suffix(".html"), page.encode())


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description="Execute the lessons; write notebooks and pages.")
    parser.add_argument("lessons", nargs="*", type=int,
                        help="numbers of the lessons; all if not given")
    parser.add_argument("-o", "--output", type=Path, default=LESSONS,
                        help="folder to write to; that of the lessons if not given")
    args = parser.parse_args(argv)
    chosen = sources(args.lessons)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"{sys.executable} has no {', '.join(missing)}: run `make notebooks`, or "
                        "`pip install -r requirements-notebooks.txt`")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a warning of ipykernel's
    for source in chosen:
        print(f"{source.stem} ...", end=" ", flush=True)
        begin = time.perf_counter()
        build(source, args.output)
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    print(f"Open {args.output / chosen[0].with_suffix('.html').name} to read, or run "
          f"`{Path(sys.executable).parent / 'jupyter'} lab {args.output}` to work with them.")


if __name__ == "__main__":
    cli.run(main)
