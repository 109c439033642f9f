"""The page: an image, a paper and a rate on top, and below what the codec makes of the image."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import UserError, data, processes
from common.demo import coding, pictures, report

# Read by Gradio when it is imported: no report of its use leaves this machine.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")

import gradio as gr  # noqa: E402
from gradio.themes import Default  # noqa: E402

STYLE = Path(__file__).with_name("page.css")
TITLE = "Learned image compression"
INTRO = ("Drop an image, choose a paper and a rate, and press Encode. Everything runs on this "
         "machine, with the bundled weights: narrow networks after a short training.")
KEPT = 16  # results whose files can still be downloaded
QUEUED = 20  # requests that wait, as one image is coded at a time
UPLOAD = "300mb"
WIDE = 320  # least width of a part, in pixels of CSS: on a phone each has its own row
SIMPLE_FONTS = ("ui-sans-serif", "system-ui", "sans-serif")  # those of the system: none is loaded
MONO_FONTS = ("ui-monospace", "monospace")
EXAMPLES = ("kodim04.png", "kodim05.png", "kodim13.png", "kodim23.png")
Update = Any  # what Gradio takes as a new value of a component
OUT_OF_MEMORY = "there is not enough memory for this image: scale it down"


class Results:
    """The files of the last KEPT results, below a folder that exists as long as the page."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.kept: list[Path] = []

    def write(self, result: coding.Result) -> tuple[Path, Path, Path]:
        """Write the .bin file, and original and decoded image as PNG; return the three paths."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self.kept.append(folder)
        while len(self.kept) > KEPT:
            shutil.rmtree(self.kept.pop(0), ignore_errors=True)
        stem = Path(result.name).stem
        paths = tuple(folder / f"{stem}{suffix}" for suffix in (
            ".bin", ".original.png", ".decoded.png"))
        paths[0].write_bytes(result.file)
        data.write_image(result.original, paths[1])
        data.write_image(result.decoded, paths[2])
        return paths[0], paths[1], paths[2]


def build(folder: Path) -> gr.Blocks:
    """The page; its files are written below `folder`."""
    papers, results = coding.choices(), Results(folder)
    if not papers:
        raise UserError("no paper has bundled weights: train some with `make weights`")
    first = next(iter(papers))
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {TITLE}\n{INTRO}")
        with gr.Row():
            with gr.Column():
                upload = gr.File(label="Image", height=140, elem_id="image")
                if examples := [data.KODAK / name for name in EXAMPLES
                                if (data.KODAK / name).exists()]:
                    gr.Examples([[str(path)] for path in examples], [upload],
                                label="or one of these")
            with gr.Column():
                paper = gr.Dropdown(list(papers), value=first, label="Paper", elem_id="paper",
                                    info=_missing(coding.without_weights()))
                weights = gr.Dropdown(papers[first], value=coding.default_weights(first),
                                      label="Weights", elem_id="weights",
                                      allow_custom_value=True,  # that of the paper before
                                      info="a number is the lmbda of the training")
                position = gr.Slider(0, 100, value=50, step=0.5, visible=False, elem_id="rate",
                                     label="Rate, in percent of the range that was trained",
                                     buttons=[])
                rate_text = gr.Markdown(visible=False, elem_id="rate-text")
                encode = gr.Button("Encode", variant="primary", elem_id="encode")
        message = gr.HTML(elem_id="message")
        with gr.Column(visible=False, elem_id="results") as shown:
            numbers = gr.HTML(elem_id="numbers")
            with gr.Row(equal_height=False):
                original = _picture("Original", "original")
                decoded = _picture("Decoded", "decoded")
            with gr.Row():
                file = gr.DownloadButton("Download the file (.bin)", elem_id="file")
                png = gr.DownloadButton("Download the decoded image (.png)", elem_id="png")
            with gr.Row(equal_height=False):
                with gr.Column(min_width=WIDE):
                    rate = gr.HTML(container=True, padding=True, elem_id="bytes")
                with gr.Column(min_width=WIDE):
                    times = gr.HTML(container=True, padding=True, elem_id="times")
            with gr.Row(equal_height=False):
                bits = _picture("Bits at each latent position", "bits")
                latents = gr.Gallery(label="Latent: the channels that vary most", columns=4,
                                     format="png", elem_id="latents", min_width=WIDE,
                                     object_fit="contain", buttons=["fullscreen"])
        outputs = [message, shown, numbers, original, decoded, file, png, rate, times, bits,
                   latents]

        def coded(path: str | None, paper: str, weights: str, position: float,
                  progress: gr.Progress = gr.Progress()) -> list[Update]:  # noqa: B008  # Gradio's
            """What changes when an image is coded."""
            try:
                if not path:
                    raise UserError("There is no image yet: drop one into the field.")
                if weights not in papers[paper]:  # its list follows the paper a moment later
                    weights = coding.default_weights(paper)
                result = coding.code(path, paper, weights, position / 100,
                                     lambda share, text: progress(share, text))
                return _values(result, results.write(result))
            except UserError as e:
                text = str(e)
            except (MemoryError, RuntimeError) as e:
                if not processes.out_of_memory(e):
                    raise
                text = OUT_OF_MEMORY
            return [report.message(text, "error"), gr.update(visible=False),
                    *[gr.skip()] * (len(outputs) - 2)]

        gr.on([encode.click, position.release], coded, [upload, paper, weights, position], outputs,
              concurrency_id="coding", concurrency_limit=1, trigger_mode="always_last",
              show_progress_on=[message], api_visibility="private")
        paper.change(lambda paper: gr.update(choices=papers[paper],
                                             value=coding.default_weights(paper)),
                     [paper], [weights], queue=False, show_progress="hidden",
                     api_visibility="private")
        gr.on([page.load, weights.change, position.change], _rate, [paper, weights, position],
              [position, rate_text], queue=False, show_progress="hidden",
              trigger_mode="always_last", api_visibility="private")
    return page


def _picture(label: str, name: str) -> gr.Image:
    return gr.Image(label=label, elem_id=name, format="png", interactive=False,
                    min_width=WIDE, buttons=["fullscreen"], alt_text=label)


def _missing(papers: Sequence[str]) -> str | None:
    """What the choice of papers says about those that cannot be chosen."""
    return f"without bundled weights: {', '.join(papers)}" if papers else None


def _rate(paper: str, weights: str, position: float) -> list[Update]:
    """Slider and text of the rate, which are shown for weights with a variable rate."""
    if weights not in coding.choices().get(paper, []):  # the paper has just been changed
        return [gr.skip(), gr.skip()]
    text = coding.describe_rate(coding.load(paper, weights).model, position / 100)
    return [gr.update(visible=bool(text)), gr.update(value=text, visible=bool(text))]


def _values(result: coding.Result, paths: tuple[Path, Path, Path]) -> list[Update]:
    """What the components show of a result, in the order of the outputs in `build`."""
    notices = "".join(map(report.message, result.notices))
    file, original, decoded = map(str, paths)
    inside: list[Update] = [gr.update(visible=False)] * 3
    times = report.times(result)
    if result.bits is not None and result.latents is not None:
        most = max(result.bits["map"]["bits"])
        inside = [gr.update(value=report.rate(result.bits, len(result.file)), visible=True),
                  gr.update(value=pictures.bits_map(result.bits), visible=True,
                            label=f"Bits at each latent position: 0 (dark) to {most:g} (bright)"),
                  gr.update(value=pictures.latent_channels(result.latents), visible=True)]
    return [notices, gr.update(visible=True), report.numbers(result), original, decoded, file,
            decoded, inside[0], times, *inside[1:]]


def launch(page: gr.Blocks, port: int, browser: bool) -> None:
    """Serve the page on the loopback address, from a thread, until the process ends.

    browser: open it in the browser of this machine.
    """
    theme = Default(font=SIMPLE_FONTS, font_mono=MONO_FONTS)
    page.queue(max_size=QUEUED, default_concurrency_limit=1)
    page.launch(server_name="127.0.0.1", server_port=port, share=False, inbrowser=browser,
                quiet=True, show_error=False, prevent_thread_lock=True, max_file_size=UPLOAD,
                footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False,
                pwa=False, mcp_server=False, theme=theme, css_paths=STYLE)
