"""A headless Chromium, driven by the DevTools protocol over pipes; nothing has to be installed.

    with Browser(path) as page:
        page.run("document.title")

Chromium reads commands from file descriptor 3 and answers on 4, as JSON that a zero byte ends.
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--remote-debugging-pipe")
PATIENCE = 120  # seconds; on a busy machine Chromium takes half a minute to start


def program():
    """Path of Chromium or Chrome; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A page in a new browser; `errors` lists what went wrong in it, `requests` its addresses.

    page: path of a file, or an address.
    """

    def __init__(self, page, width=1280, height=900):
        self.address = page if "://" in str(page) else f"file://{page}"
        self.size = width, height
        self.errors, self.requests = [], []
        self._number, self._buffer, self._session = 0, b"", None

    def __enter__(self):
        self._folder = tempfile.mkdtemp()
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()

        def arrange():  # in the child: its ends become 3 and 4
            ends = os.dup(theirs_in), os.dup(theirs_out)  # above 4, whatever was free
            high = [os.dup2(end, 50 + i) for i, end in enumerate(ends)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [program(), *FLAGS, f"--user-data-dir={self._folder}",
             f"--window-size={self.size[0]},{self.size[1]}", "about:blank"],
            close_fds=False, preexec_fn=arrange, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target,
                                  flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=self.size[0], height=self.size[1],
                  deviceScaleFactor=1, mobile=self.size[0] < 600)
        self.call("Page.navigate", url=self.address)
        self.wait("document.readyState === 'complete'")
        return self

    def __exit__(self, *_):
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, method, **params):
        """Send a command of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self):
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
            more = os.read(self._in, 1 << 20) if ready else b""
            assert more, "the browser does not answer"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        """Keep what an event says about errors, and the addresses that the page asks for."""
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(str([a.get("value") or a.get("description")
                                    for a in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def run(self, code):
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=code, awaitPromise=True,
                           returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, code):
        """Wait until an expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.run(code):
            assert time.monotonic() < deadline, f"never true: {code}"
            time.sleep(0.05)

    def press(self, key):
        """Press and release a key, such as "Tab", "ArrowRight" or " "."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}
        text = {" ": " ", "Enter": "\r"}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key,
                      code="Space" if key == " " else key, windowsVirtualKeyCode=codes[key],
                      **({"text": text} if text and kind == "keyDown" else {}))

    def give_file(self, selector, path):
        """Choose a file in the input element that a CSS selector finds."""
        element = self.call("Runtime.evaluate", expression=f"document.querySelector({selector!r})")
        self.call("DOM.setFileInputFiles", files=[str(path)],
                  objectId=element["result"]["objectId"])

    def keep_downloads(self, folder):
        """Write what is downloaded from now on into a folder."""
        self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def check_offline(self):
        """The page has raised no error and asked for no address."""
        assert self.errors == []
        assert all(url.startswith(("file:", "data:", "blob:")) for url in self.requests)

    def screenshot(self):
        """A picture of the whole page, as the content of a PNG file."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])


def check_telephone(page, ready, element):
    """On a narrow screen, page and element fit its width; ready: what to wait for."""
    with Browser(page, 390, 800) as small:
        small.wait(ready)
        assert small.run("document.documentElement.scrollWidth") <= 390
        width = f"document.getElementById('{element}').getBoundingClientRect().width"
        assert small.run(width) <= 390
        assert small.errors == []
