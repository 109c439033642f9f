"""The page of training runs: what is read from a run's files, and the page in headless Chromium."""

import json
import time

from common import UserError, html_page
from common.evaluation import curves, curves_page, runs
from common.training.log import Log

import browser
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

FLAGS = {"lmbda": 0.013, "batch_size": 4, "patch_size": 128, "steps_before": 500, "seed": 0,
         "lr": 0.001, "flip": True}


def write_run(root, paper, steps, offset=0.0):
    """A run of `steps` steps in epochs of 10, as train.py logs it; returns its log folder."""
    folder = root / paper / "logs" / "quick" / "0"
    log = Log(folder, steps, quiet=True)
    log.begin()
    for step in range(1, steps + 1):
        log.step(step, {"loss": offset + 10 / step, "bpp": 1 / step, "lr": 0.001, "grad_norm": 2.0,
                        "level": step % 3}, every=5)
        if step % 10 == 0:
            loss = offset + 12 / step
            log.scalars("test", {"loss": loss, "bpp": 1.1 / step, "psnr": 20.0 + step}, step)
            log.line(f"epoch {step // 10 - 1}  step {step}  train loss {offset + 10 / step:.4f} "
                     f"bpp {1 / step:.4f}  test loss {loss:.4f} bpp {1.1 / step:.4f} "
                     f"psnr {20 + step:.2f}")
    log.close()
    checkpoints = root / paper / "ckpts" / "quick" / "0"
    checkpoints.mkdir(parents=True)
    (checkpoints / "config.yaml").write_text(yaml.safe_dump(FLAGS))
    return folder


# ------------------------------------------------------------------------------- what is read
def test_a_run_is_read_from_its_files(tmp_path):
    run = runs.read_run(write_run(tmp_path, "hyperprior", 40))
    assert (run.paper, run.steps, run.hardware) == ("hyperprior", 40, "")
    assert run.pixels == 40 * 4 * 128 * 128
    assert run.flags == "--lmbda 0.013 --lr 0.001 --batch_size 4 --patch-size 128 --flip"
    train = run.series["loss", "train"]
    assert list(train) == [5, 10, 15, 20, 25, 30, 35, 40] and train[20][1] == pytest.approx(0.5)
    assert run.last("psnr") == pytest.approx(60) and run.last("loss") == pytest.approx(0.3)
    row = dict(zip(curves_page.HEAD, curves_page._row("a", run), strict=True))
    assert row["pixels seen"] == "2.621 M" and row["steps before"] == "500"
    assert row["lmbda"] == "0.013" and row["validation PSNR"] == "60.00"


def test_without_events_there_are_the_epochs_of_the_log(tmp_path):
    """And the words that some papers use in place of "test" are understood."""
    (tmp_path / "log.txt").write_text(
        "epoch 0  step 10  train loss 3.0 bpp 0.5  valid loss 2.0 bpp 0.4 psnr 27.5\n"
        "epoch 1  step 20  train loss 2.5 bpp 0.5\n"
        "epoch 2  step 30  train loss 2.0 bpp 0.5  test loss 1.5 (sum) bpp 0.3 psnr 28.5 (means)\n")
    run = runs.read_run(tmp_path)
    assert run.series["loss", "train"] == {10: (None, 3.0), 20: (None, 2.5), 30: (None, 2.0)}
    assert run.series["psnr", "validation"] == {10: (None, 27.5), 30: (None, 28.5)}
    assert run.hours is None and run.pixels is None and run.flags == ""
    assert "event files" in curves_page._notes({"a": run})[-1]


def test_hours_do_not_count_interruptions(tmp_path):
    """A run is stopped after step 30 and continues, hours later, from step 20."""
    begin = time.time()
    for steps in ((10, 20, 30), (21, 31)):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{steps[0]}") as board:
            for n, step in enumerate(steps, 1):
                board.add_scalar("train/loss", step, step, walltime=begin + 1800 * n)
    points = runs.read_events(tmp_path)["loss", "train"]
    hours = {step: hours for step, (hours, _) in points.items()}
    assert hours == pytest.approx({10: 0.5, 20: 1.0, 21: 1.5, 31: 2.0}, abs=0.05)


def test_long_series_are_thinned_and_keep_their_end(monkeypatch):
    monkeypatch.setattr(curves_page, "MOST", 10)
    found = curves_page._series("loss", "train", {n: (n / 7, 1 / (n + 1)) for n in range(96)})
    assert found["steps"] == [*range(0, 96, 10), 95]
    assert found["values"][-1] == pytest.approx(1 / 96, rel=1e-5)
    assert json.loads(json.dumps(curves_page._series("x", "train", {1: (None, float("nan"))})))[
        "values"] == [None]


def test_missing_plotly_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(html_page, "missing", lambda: "pip install plotly")
    with pytest.raises(UserError, match="^--html needs Plotly: pip install plotly$"):
        curves.main([str(tmp_path), "--html", str(tmp_path / "a.html")])


# ------------------------------------------------------------------------------------ the page
@pytest.fixture(scope="module")
def html(tmp_path_factory):
    if not browser.program():
        pytest.skip("needs Chromium (apt-get install chromium)")
    pytest.importorskip("plotly", reason="needs plotly (pip install plotly)")
    folder = tmp_path_factory.mktemp("curves")
    found = [write_run(folder, "hyperprior", 40), write_run(folder, "joint_ar", 60, offset=1.0)]
    curves.main([*map(str, found), "--html", str(folder / "report.html")])
    assert not list(folder.rglob("*.png"))
    return folder / "report.html"


@pytest.fixture(scope="module")
def shared(html):
    with browser.Browser(html) as opened:
        yield opened


@pytest.fixture
def opened(shared):
    """The page; whatever a test does on it must not raise an error or ask for an address."""
    yield shared
    shared.check_offline()


def panel(opened, code, name="loss"):
    return opened.run(f"document.getElementById('panel-{name}').{code}")


def visible(opened, name="loss"):
    return panel(opened, "data.map((trace) => trace.visible)", name)


def click(opened, text):
    """Click the box whose label is this text."""
    opened.run(f"""[...document.querySelectorAll('#choices label')]
        .find((label) => label.textContent.trim() === '{text}').querySelector('input').click()""")


def choose(opened, name, value, event="change"):
    opened.run(f"""(() => {{ get('{name}').value = '{value}';
        get('{name}').dispatchEvent(new Event('{event}')); }})()""")


def test_runs_and_kinds_are_switched_on_and_off(opened):
    lines = panel(opened, "data.map((trace) => [trace.name, trace.line.dash])")
    assert lines == [[name, dash] for name in ("hyperprior", "joint_ar")
                     for dash in ("solid", "dash")]
    assert visible(opened) == [True] * 4
    click(opened, "joint_ar")
    assert visible(opened) == [True, True, False, False]
    click(opened, "train")
    assert visible(opened) == [False, True, False, False] and visible(opened, "lr") == [False] * 2
    click(opened, "joint_ar")
    click(opened, "train")
    assert visible(opened) == [True] * 4


def test_curves_by_steps_and_by_hours(opened):
    assert panel(opened, "data[0].x") == [5, 10, 15, 20, 25, 30, 35, 40]
    assert panel(opened, "data[3].x") == [10, 20, 30, 40, 50, 60]
    choose(opened, "axis", "hours")
    assert panel(opened, "layout.xaxis.title.text") == "hours of training"
    hours = panel(opened, "data[0].x")
    assert hours == sorted(hours) and 0 <= hours[-1] < 1
    choose(opened, "axis", "steps")


def test_smoothing_is_a_running_mean(opened):
    choose(opened, "smoothing", "0", "input")
    assert panel(opened, "data[0].y[0]") == pytest.approx(2.0)
    choose(opened, "smoothing", "0.5", "input")  # by hand: (2 * 0.25 + 1 * 0.5) / 0.75
    assert panel(opened, "data[0].y.slice(0, 2)") == pytest.approx([2.0, 4 / 3])
    assert panel(opened, "data[1].y[0]") == pytest.approx(1.2)  # validation as it is
    choose(opened, "smoothing", "0.6", "input")


def test_further_quantities_and_logarithmic_values(opened):
    names = "[...document.querySelectorAll('.panel')].map((box) => box.id.slice(6))"
    first = ["loss", "bpp", "psnr", "lr", "grad_norm"]
    assert opened.run(names) == first
    opened.run("get('every').click()")
    assert opened.run(names) == [*first, "level"]
    opened.run("get('log').click()")
    assert panel(opened, "layout.yaxis.type", "level") == "log"
    opened.run("get('log').click()")
    opened.run("get('every').click()")
    assert opened.run(names) == first


def test_the_table_names_each_run(opened):
    cells = opened.run("""[...document.querySelectorAll('#rows tbody tr')].map((row) =>
        [row.cells[0].textContent, row.cells[3].textContent, row.cells[10].textContent])""")
    assert cells == [["hyperprior", "40", "60.00"], ["joint_ar", "60", "80.00"]]
    assert "a checkpoint that names the hardware" in opened.run("get('remarks').textContent")


def test_light_and_dark(opened):
    color = "getComputedStyle(document.body).backgroundColor"
    colors = set()
    for _ in range(2):
        colors.add((opened.run(color), panel(opened, "layout.font.color")))
        opened.run("get('theme').click()")
    assert colors == {("rgb(255, 255, 255)", "#1c1c1e"), ("rgb(23, 24, 27)", "#e8e8ea")}


def test_a_telephone_scrolls_in_one_direction(html):
    ready = "document.querySelector('#panel-loss .main-svg') !== null"
    browser.check_telephone(html, ready, "panel-loss")
