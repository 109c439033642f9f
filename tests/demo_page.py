"""What a reader does on the page of `make demo`, in a browser of `browser.py`."""

import time
from pathlib import Path

NUMBERS = "(document.querySelector('#numbers dl')?.textContent ?? '')"


def wait_until_ready(page):
    """Wait until all that a reader can use is there: Gradio loads it part by part."""
    for part in ("#image input[type=file]", "#paper input", "#weights input", "#encode"):
        page.wait(f"document.querySelector('{part}') !== null")


def choose(page, field, text):
    """Choose the option `text` of a drop-down list, as a click would."""
    page.run(f"document.querySelector('#{field} input').focus()")
    option = ("[...document.querySelectorAll('ul[role=listbox] li')]"
              f".find((o) => o.getAttribute('aria-label') === '{text}')")
    page.wait(f"{option} !== undefined")
    page.run(f"{option}.dispatchEvent(new MouseEvent('mousedown', {{bubbles: true}}))")
    page.wait(f"document.querySelector('#{field} input').value === '{text}'")


def upload(page, path):
    """Choose a file as the image."""
    wait_until_ready(page)
    page.give_file("#image input[type=file]", path)
    page.wait(f"document.querySelector('#image').textContent.includes('{path.stem}')")


def encode(page):
    """Press the button and wait for new numbers; returns their text."""
    before = shown(page)
    page.run("document.querySelector('#encode').click()")
    return wait_for_change(page, before)


def shown(page):
    """The text of the numbers; an empty string if there are none."""
    return page.run(NUMBERS)


def wait_for_change(page, before):
    """Wait until there are other numbers than `before`; returns their text."""
    page.wait(f"!['', {before!r}].includes({NUMBERS})"
              " && document.querySelector('#decoded img')?.complete")
    return shown(page)


def download(page, folder, button, name):
    """Click on a button and return the content of the file that it downloads."""
    page.keep_downloads(folder)
    page.run(f"document.querySelector('#{button}').click()")
    path, deadline = Path(folder, name), time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, [*Path(folder).iterdir()]
        time.sleep(0.05)
    return path.read_bytes()
