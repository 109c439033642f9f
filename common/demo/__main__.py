"""A page in the browser that codes images with the bundled weights of every paper.

    python -m common.demo                 opens the page in the browser (`make demo`)
    python -m common.demo --no-browser --port 8000

It is served on the loopback address only, so nobody else on the network can reach it, and it asks
for nothing from the network. One image is coded at a time; further ones wait.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

from common import UserError, cli, processes

PORT, TRIED = 7860, 20  # the first port that is tried without --port, and how many are
ADDRESS = "127.0.0.1"


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m common.demo",
                        description="Serve a page that codes images with the bundled weights.")
    parser.add_argument("--port", type=cli.positive_int, help="port of the page on this machine; "
                        f"the first free one from {PORT} on if not given")
    parser.add_argument("--no-browser", action="store_true",
                        help="only print the address, without opening it in a browser")
    parser.add_argument("--threads", type=cli.threads, default=0,
                        help="number of CPU threads; 0 uses all")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"{sys.executable} has no gradio: run `make demo`, which installs it, or "
                        "`pip install -r requirements-demo.txt`")
    port = free_port(args.port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes the folder
    processes.start("cpu", threads=args.threads)
    with tempfile.TemporaryDirectory(prefix="licodecs-demo-",
                                     ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "uploads"))
        for name in ("NO_PROXY", "no_proxy"):  # Gradio asks its own server whether it runs
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), ADDRESS)))
        from common.demo import page  # after the variable is set

        blocks = page.build(Path(folder))
        page.launch(blocks, port, browser=not args.no_browser)
        print(f"the page is at http://{ADDRESS}:{port}; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def free_port(wanted: int | None) -> int:
    """The port of the page; UserError if the one that is wanted, or each of those tried, is in use.
    """
    if wanted is not None:
        if wanted > 65535:
            raise UserError(f"--port {wanted}: there are ports up to 65535")
        if not _is_free(wanted):
            raise UserError(f"--port {wanted}: is in use or reserved; give another one, or leave "
                            "it out to take a free one")
        return wanted
    for port in range(PORT, PORT + TRIED):
        if _is_free(port):
            if port != PORT:
                cli.note(f"port {PORT} is in use, so the page gets {port}")
            return port
    raise UserError(f"the ports {PORT} to {PORT + TRIED - 1} are in use: give another one with "
                    "--port")


def _is_free(port: int) -> bool:
    """Whether a server can listen at this port of the loopback address."""
    with socket.socket() as probe:
        if os.name != "nt":  # there, the option lets two servers share a port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    cli.run(main)
