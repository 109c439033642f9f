"""The page of the comparison in a headless Chromium, from disk: what a reader clicks, works."""

from common.comparison import __main__ as comparison
from common.comparison import gather, own, page, style
from common.evaluation import further_metrics

import browser
import comparison_cases
import pytest

pytestmark = pytest.mark.skipif(
    not browser.program(), reason="needs Chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    pytest.importorskip("plotly", reason="needs plotly (pip install plotly)")
    folder = tmp_path_factory.mktemp("page")
    further = [] if further_metrics.missing() else ["--metrics", "fsim,gmsd"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "run", comparison_cases.run_in_fork)
        comparison.main([
            "--dataset", str(comparison_cases.images(folder / "set")), "--into",
            str(folder / "out"), "--codecs", "jpeg", "webp", "jpeg2000", "--jobs", "1",
            "--threads", "1", *further], comparison_cases.tree(folder))
    return folder / "out" / "compare.html"


@pytest.fixture(scope="module")
def shared(html):
    with browser.Browser(html) as opened:
        opened.wait("document.getElementById('stage').dataset.drawn !== undefined")
        yield opened


@pytest.fixture
def opened(shared):
    """The page; whatever a test does on it must not raise an error or ask for an address."""
    yield shared
    shared.check_offline()


def visible(opened):
    return opened.run("document.getElementById('plot').data.map((trace) => trace.visible)")


def first_cells(opened):
    return opened.run("[...document.querySelectorAll('#rows tbody tr')]"
                      ".map((row) => row.cells[0].textContent)")


def choose(opened, select, text):
    """Choose the option of a select whose text begins so, as a click would."""
    return opened.run(f"""(() => {{
        const select = document.getElementById('{select}');
        const option = [...select.options].find((o) => o.text.startsWith('{text}'));
        select.value = option.value;
        select.dispatchEvent(new Event('change'));
        return option.text;
    }})()""")


def pixels(opened, side):
    """Sum and size of the pixels of a canvas."""
    return opened.run(f"""(() => {{
        const canvas = document.getElementById('canvas-{side}');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return [canvas.width, canvas.height, data.reduce((a, b) => a + b, 0)];
    }})()""")


def test_the_page_is_small_and_whole(html, opened):
    text = html.read_text()
    assert len(text) < page.LIMIT and not any(f"/*{n}*/" in text for n in ("DATA", "SCRIPT"))
    assert opened.run("document.title") == "2 images: comparison of image codecs"
    assert "broken.png" in opened.run("document.getElementById('remarks').textContent")


def test_images_are_left_out_of_a_page_that_would_be_too_large(tmp_path, monkeypatch):
    pytest.importorskip("plotly", reason="needs plotly (pip install plotly)")
    x = {"name": "x", "results": {"bpp": [0.1, 0.2], "psnr-rgb": [25.0, 28.0]}}
    curves = [gather.Curve("x", "ours", x)]
    monkeypatch.setattr(page, "LIMIT", 6_000_000)
    pictures = {"images": [{"name": name, "src": "s" * 10**6} for name in "abc"],
                "codecs": [{"name": "x", "points": [{"views": ["va", "vb", "vc"]}]}]}
    page.write(tmp_path / "a.html", "t", curves, style.styles(curves), curves[0], pictures, [])
    assert [image["name"] for image in pictures["images"]] == ["a"]
    assert pictures["codecs"][0]["points"][0]["views"] == ["va"]
    text = (tmp_path / "a.html").read_text()
    assert len(text) < 6_000_000 and "b is left out, as the page would exceed 6 MB" in text


def test_curves_are_switched_on_and_off(opened):
    assert visible(opened) == [True] * 4
    opened.run("document.querySelector('input[data-curve=\"1\"]').click()")
    assert visible(opened) == [True, False, True, True]
    # the box of the group switches all of its curves
    opened.run("document.querySelectorAll('#choices legend input')[1].click()")
    assert visible(opened) == [True, False, False, False]
    opened.run("document.querySelectorAll('#choices legend input')[1].click()")
    assert visible(opened) == [True] * 4


def test_axes_and_quality(opened):
    layout = "document.getElementById('plot').layout"
    assert opened.run(f"{layout}.xaxis.type") == "log"
    opened.run("document.getElementById('log').click()")
    assert opened.run(f"{layout}.xaxis.type") == "linear"
    data = opened.run("DATA.curves[0].qualities['psnr-rgb'][0]")
    low, high = opened.run(f"{layout}.xaxis.range")
    assert low == 0 and max(data) < high < 1.5 * max(data)  # the axis fits our curves
    choose(opened, "quality", "MS-SSIM")
    assert opened.run(f"{layout}.yaxis.title.text") == "MS-SSIM (dB)"
    shown = opened.run("document.getElementById('plot').data[0].y")
    assert shown == opened.run("DATA.curves[0].qualities['ms-ssim-rgb'][1]")
    choose(opened, "quality", "PSNR")
    opened.run("document.getElementById('log').click()")


@pytest.mark.skipif(bool(further_metrics.missing()), reason="needs piq (pip install piq)")
def test_further_metrics_are_plotted_and_listed(opened):
    for name in ("FSIMc", "GMSD"):
        choose(opened, "quality", name)
        lines = opened.run("document.getElementById('plot').data.map((trace) => trace.y)")
        assert len(lines) == 4 and all(line == sorted(line) and len(line) > 1 for line in lines)
        assert name in opened.run("DATA.head")
    row = opened.run("DATA.curves[0].row[DATA.head.indexOf('GMSD')]")
    assert all(0 < float(value) < 0.3 for value in row.split("-"))
    choose(opened, "quality", "PSNR")


def test_hovering_over_a_point_names_it(opened):
    opened.run("Plotly.Fx.hover('plot', [{curveNumber: 0, pointNumber: 1}])")
    opened.wait("document.querySelector('#plot .hovertext') !== null")
    text = opened.run("document.querySelector('#plot .hovertext').textContent")
    assert comparison_cases.PAPER in text and "lmbda" in text and "bpp" in text


def test_the_table_is_sorted_and_searched(opened):
    column = opened.run("DATA.head.indexOf('BD-rate %')")
    head = f"document.querySelectorAll('#rows thead button')[{column}]"
    opened.run(f"{head}.click()")
    rates = opened.run(f"""[...document.querySelectorAll('#rows tbody tr')]
        .map((row) => row.cells[{column}].textContent)""")
    assert rates[-1] == "anchor" and rates[:-1] == sorted(rates[:-1], key=float)
    up = first_cells(opened)
    opened.run(f"{head}.focus()")
    opened.press("Enter")  # by keyboard
    assert first_cells(opened) == [*up[:-1][::-1], up[-1]]
    assert opened.run("document.querySelector('th[aria-sort=descending]') !== null")
    opened.run("""(() => { const box = document.getElementById('search');
        box.value = 'webp'; box.dispatchEvent(new Event('input')); })()""")
    assert first_cells(opened) == ["WebP (measured)"]
    opened.run("""(() => { const box = document.getElementById('search');
        box.value = ''; box.dispatchEvent(new Event('input')); })()""")


def test_numbers_in_cells(opened):
    found = opened.run("""['33,000 of 0.2 M', '0.24-0.37', '-12.5', '+3.0 (at one point)', '1.2 M',
                          'JPEG'].map(numberIn)""")
    assert found == [33000, 0.24, -12.5, 3.0, 1.2e6, None]


def test_the_matrix_has_all_pairs(opened):
    cells = opened.run("""[...document.querySelectorAll('#deltas tbody tr')]
        .map((row) => [...row.cells].slice(1).map((cell) => cell.textContent))""")
    values = opened.run("DATA.matrices.values['psnr-rgb']")
    assert cells == [["" if v is None else f"{v:.1f}" for v in row] for row in values]
    assert len(cells) == 4 and all(cells[i][i] == "0.0" for i in range(4))
    choose(opened, "matrix-quality", "MS-SSIM")
    other = opened.run("document.querySelector('#deltas tbody').textContent")
    assert other != "".join(sum(cells, []))
    choose(opened, "matrix-quality", "PSNR")


def drawn(opened, mode):
    """Wait until the stage shows this mode of what is chosen."""
    chosen = "['left', 'right', 'image'].map((id) => get(id).value).join(' ')"
    opened.wait(f"get('stage').dataset.drawn === '{mode} ' + {chosen}")


def test_the_border_between_images_moves(opened):
    drawn(opened, "images")
    left, right = pixels(opened, "left"), pixels(opened, "right")
    assert left[:2] == right[:2] == [208, 176] and left != right
    clip = "document.getElementById('canvas-right').style.clipPath"
    assert opened.run(clip) == "inset(0px 0px 0px 50%)"
    opened.run("document.getElementById('split').focus()")
    for _ in range(3):
        opened.press("ArrowRight")
    assert opened.run(clip) == "inset(0px 0px 0px 53%)"
    assert opened.run("document.getElementById('divider').style.left") == "53%"


def test_codecs_meet_at_the_nearest_rate(opened):
    choose(opened, "right", "WebP")
    drawn(opened, "images")
    rate = opened.run("chosen.left.bpp")
    rates = opened.run("codecOf('right').points.map((point) => point.views[0].bpp)")
    nearest = min(rates, key=lambda other: max(other / rate, rate / other))
    assert opened.run("chosen.right.bpp") == nearest
    assert f"{nearest:.3f} bpp" in opened.run("get('caption-right').textContent")


def test_errors_and_bits(opened):
    drawn(opened, "images")
    picture = pixels(opened, "left")
    choose(opened, "mode", "error")
    drawn(opened, "errors")
    assert 0 < pixels(opened, "left")[2] != picture[2]
    choose(opened, "mode", "bits")
    drawn(opened, "bits")
    width, height, total = pixels(opened, "left")
    assert [width, height] == [13, 11] and total > 255 * 13 * 11  # more than opaque black
    assert opened.run("document.getElementById('stage').classList.contains('coarse')")
    choose(opened, "mode", "decoded")


def test_where_the_rate_goes(opened):
    text = opened.run("document.getElementById('rate-left').textContent")
    assert "header and checksum" in text and "y, in 2 steps (pass)" in text
    shares = opened.run("""[...document.querySelectorAll('#rate-left .bar span')]
        .map((piece) => parseFloat(piece.style.width))""")
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert opened.run("document.getElementById('steps-left').data[0].y.length") == 2
    assert opened.run("document.getElementById('steps-right').hidden")  # not one of ours


def test_light_and_dark(opened):
    color = "getComputedStyle(document.body).backgroundColor"
    before = opened.run(color)
    opened.run("document.getElementById('theme').click()")
    after = opened.run(color)
    assert {before, after} == {"rgb(255, 255, 255)", "rgb(23, 24, 27)"}
    opened.run("document.getElementById('theme').click()")


def test_a_telephone_scrolls_in_one_direction(html):
    ready = "document.getElementById('stage').dataset.drawn !== undefined"
    browser.check_telephone(html, ready, "plot")
