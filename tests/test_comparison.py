"""The comparison of all curves: what is gathered, what is left out and named, BD-rates, styles."""

import json
import re

from common import UserError, data
from common.coding import bitstream, image_file
from common.coding.codecs import loader
from common.comparison import __main__ as comparison
from common.comparison import deltas, front_page, gather, own, style, table, viewer
from common.comparison.gather import Curve
from common.evaluation import further_metrics, image_sets
from common.evaluation.classical import CODECS
from common.evaluation.results import load_published, load_results, save_results
from common.papers import ROOT, papers
from common.recipes.tables import table_of

import comparison_cases
import pytest
import torch

KODAK = image_sets.KNOWN["Kodak"]
VTM = {"bmshj2018-factorized": 68.7, "bmshj2018-hyperprior": 31.0, "mbt2018-mean": 21.8,
       "mbt2018": 11.5, "cheng2020-anchor": 4.0}  # BD-rates against VTM, from the literature


def curve(rates, psnrs, name="x", kind="ours", **meta):
    meta = {"images_digest": KODAK, **meta}
    return Curve(name, kind, {"name": name, "results": {"bpp": rates, "psnr-rgb": psnrs},
                              "meta": meta})


# ------------------------------------------------------------------------------------- BD-rates
@pytest.mark.parametrize("name", VTM)
def test_bd_rates_of_the_published_curves(name):
    curves = gather.published(ROOT, KODAK, [])
    found = deltas.delta(gather.find(curves, "VTM"), gather.find(curves, name))
    assert found.rate == pytest.approx(VTM[name], abs=0.3)


def test_bd_rate_by_hand():
    """Twice the rate at each PSNR is +100 %; the reverse is -50 %; and at one point alike."""
    a = curve([0.1, 0.2, 0.4], [25.0, 28.0, 31.0])
    b = curve([0.2, 0.4, 0.8], [25.0, 28.0, 31.0])
    assert deltas.delta(a, b).rate == pytest.approx(100)
    assert deltas.matrix([a, b]) == [[0.0, pytest.approx(100, abs=0.01)],
                                     [pytest.approx(-50, abs=0.01), 0.0]]
    point = deltas.delta(a, curve([0.4], [28.0]))
    assert point.rate == pytest.approx(100) and point.one_point and "at one point" in str(point)
    assert deltas.delta(a, curve([0.4], [32.0])) is None
    found = deltas.delta(a, curve([0.2, 0.8], [27.0, 35.0]))
    assert (found.low, found.high) == (27, 31) and found.overlap == "27.0-31.0"


def test_ms_ssim_is_compared_in_decibels():
    ours = curve([0.1, 0.2], [25.0, 28.0])
    ours.results["results"]["ms-ssim-rgb"] = [0.9, None]
    assert ours.points("ms-ssim-rgb") == ([0.1], [pytest.approx(10)])


# ------------------------------------------------------------------------------------ gathering
def test_every_published_curve_has_a_source():
    curves = load_published(gather.PUBLISHED)
    assert len(curves) == 65 and all(c["meta"]["source"] for c in curves)
    assert curves[0]["name"] == "VTM"


def test_bundled_results_of_all_papers_are_gathered():
    problems = []
    found = gather.own_results(ROOT, KODAK, problems)
    assert {c.paper for c in found} == set(papers()) and not problems
    first = {c.paper: c.name for c in reversed(found)}
    assert first == {paper: f"{paper}, small" for paper in papers()}  # the bundled weights
    names = [c.name for c in found]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("paper", papers())
def test_results_are_those_of_the_bundled_weights(paper):
    """If not: make report-PAPER"""
    results = load_results(ROOT / paper / "results" / "small.json")
    models = map(loader(paper), sorted((ROOT / paper / "weights").glob("*.pth")))
    assert set(results["meta"]["fingerprint"]) == {bitstream.fingerprint(m).hex() for m in models}


def test_results_of_other_weights_are_named():
    bundled = [own.Bundled("a", "small", [], curve([0.1], [25.0], fingerprint=["00"]).results, [])]
    ours = [Curve(name, "ours", curve([0.1], [25.0], fingerprint=[mark]).results, "a")
            for name, mark in (("a, small", "00"), ("a, quick", "01"))]
    assert own.of_other_weights(ours, bundled) == []
    ours[0].results["meta"]["fingerprint"] = ["01"]
    line, = own.of_other_weights(ours, bundled)
    assert line.startswith("a, small: its results are of other weights") and "report-a" in line


def test_files_of_the_wrong_form_are_left_out_and_named(tmp_path):
    paper = tmp_path / "new"
    (paper / "results").mkdir(parents=True)
    for name in ("model.py", "train.py"):
        (paper / name).touch()
    good = curve([0.1, 0.2], [25.0, 28.0], "small").results
    save_results(paper / "results/small.json", good)
    save_results(paper / "results/other.json",
                 good | {"meta": {"images_digest": "3 images 0123"}})
    (paper / "results/broken.json").write_text('{"name": "x", ')
    (paper / "results/short.json").write_text(json.dumps(
        good | {"results": {"bpp": [1, 2], "psnr-rgb": [30]}}))
    (paper / "results/text.json").write_text(json.dumps(good | {"meta": {"steps": "many"}}))
    (paper / "results/table.json").write_text('{"name": "variants", "rows": []}')  # no curve
    (paper / "results/published.json").write_text('{"curves": 3}')
    problems = []
    assert [c.name for c in gather.own_results(tmp_path, KODAK, problems)] == ["new, small"]
    assert [p.partition(": left out")[0] for p in problems] == [
        f"new/results/{name}.json" for name in ("broken", "other", "short", "text")]
    problems = []
    assert gather.published(tmp_path, KODAK, problems)
    assert problems == ['new/results/published.json: left out: not published curves, there are no '
                        '"curves" in it']
    problems = []
    missing = tmp_path / "missing.json"
    found = gather.named_results([missing, paper / "results/small.json"], KODAK, problems)
    assert [c.name for c in found] == ["new, small"] and "missing.json" in problems[0]
    with pytest.raises(UserError, match="--anchor VVC: there is no such curve; choose .*new, sm"):
        gather.find(found, "VVC")


def test_a_published_curve_that_is_to_be_shown_but_missing_is_named(tmp_path, monkeypatch):
    content = json.loads(gather.PUBLISHED.read_text())
    content["shown"].append("ELIC 2")
    (tmp_path / "published.json").write_text(json.dumps(content))
    monkeypatch.setattr(gather, "PUBLISHED", tmp_path / "published.json")
    problems = []
    assert len(gather.published(tmp_path / "none", KODAK, problems)) == 65
    assert len(problems) == 1 and "there is no curve ELIC 2" in problems[0]


# ---------------------------------------------------------------------------------- how it looks
def test_no_two_curves_look_alike():
    ours = gather.own_results(ROOT, KODAK, [])
    classical = [curve([1, 2], [3, 4], str(i), "classical") for i in range(9)]
    published = gather.published(ROOT, KODAK, [])
    curves = [*ours, *classical, *published]
    found = style.styles(curves)
    assert len({s.color for s in found}) == len(curves) > 80
    lines = {kind: {(s.line, s.dash) for c, s in zip(curves, found, strict=True) if c.kind == kind}
             for kind in gather.KINDS}
    assert len(set.union(*lines.values())) == 3
    shapes = [{s.symbol for c, s in zip(curves, found, strict=True) if c.kind == kind}
              for kind in gather.KINDS]
    assert sum(map(len, shapes)) == len(set.union(*shapes))  # no shape serves two kinds


def test_cells_of_a_row():
    ours = curve([0.1, 0.25], [25.0, 28.5], steps=[9_000, 12_000], steps_source=200_000,
                 hardware="a CPU", lmbda=[0.01, 0.02])
    ours.results["results"] |= {"encoding_time": [0.5, None]}
    ours.cost = {"params_total": 1_500_000, "macs_thop": 4 * 10**9, "macs_true": 10**9,
                 "macs_gdn": 10**8, "macs_masked": 0, "macs_products": 0}
    anchor = curve([0.05, 0.125], [25.0, 28.5])
    row = dict(zip(table.HEAD, table.curve_row(ours, anchor), strict=True))
    assert row == {
        "curve": "x", "from": "ours, measured", "points": "2", "bpp": "0.100-0.250",
        "PSNR": "25.00-28.50", "MS-SSIM": "-", "BD-rate %": "+100.0", "overlap dB": "25.0-28.5",
        "M param.": "1.50", "GMAC": "1.1", "GMAC thop": "4.0", "encode s": "0.500",
        "decode s": "-", "hardware": "a CPU", "steps": "9,000-12,000 of 0.2 M"}
    assert table.curve_row(anchor, anchor)[6] == "anchor"
    assert "| x     | ours, measured | lmbda 0.02 | 0.2500 | 28.50 |" in table.points_table([ours])


# ------------------------------------------------------------------------------ where bits go
@pytest.mark.parametrize("paper", papers())
def test_the_parts_of_a_file_add_up(paper):
    """Sections of y, where there is one for each step, have the bytes that are stated for it."""
    weights = sorted((ROOT / paper / "weights").glob("small-*.pth"))[-1]
    model = loader(paper)(weights)
    x = data.read_image(data.KODAK / "kodim05.png")[:, 200:328, 200:456].contiguous()
    rate = {"lmbda": 0.004} if getattr(model, "variable_rate", False) else {}
    file = image_file.encode_image(model, data.to_float(x), **rate)
    assert own.rate_of(model, file).keys() >= rate.keys()
    found = viewer.where_bits_go(model, x, file)
    sections = [len(s) for s in bitstream.unpack(file, model.tag).sections]
    parts = found["header"] + found.get("z", 0) + sum(found["y"]) + found["coder"]
    assert parts == pytest.approx(len(file), abs=0.1 * (len(found["y"]) + 3))
    assert found["header"] == len(file) - sum(sections) <= 40
    # the estimate charges 30 bits where the likelihood is at its bound, 1e-9; a table at most 16
    padded = image_file.pad(data.to_float(x)[None], model.downsampling_factor)
    with torch.no_grad():
        at_bound = int((model(padded, **rate)["likelihoods"]["y"] < 1.01e-9).sum())
    assert -2 - at_bound * 14 / 8 < found["coder"] < 0.02 * len(file) + 8 * len(sections)
    if len(sections) == len(found["y"]) + 1 > 2:
        for coded, stated in zip(sections, found["y"], strict=False):
            assert coded == pytest.approx(stated, rel=0.03, abs=8)
    bits = torch.tensor(found["map"]["bits"]).view(found["map"]["height"], found["map"]["width"])
    assert bits.shape in ((8, 16), (4, 8))
    assert float(bits.sum()) / 8 == pytest.approx(sum(found["y"]), rel=0.01)


def test_nearest_points():
    assert viewer.near([0.1, 0.3, 1.0, 4.0], (0.2, 0.9, 1.1)) == [1, 2]


# ------------------------------------------------------------------------------- the whole command
@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder with two images and a broken one, compared; what was printed, and its folder."""
    folder = tmp_path_factory.mktemp("comparison")
    patch = pytest.MonkeyPatch()
    patch.setattr(own, "run", comparison_cases.run_in_fork)
    root, images = comparison_cases.tree(folder), comparison_cases.images(folder / "set")
    flags = ["--dataset", str(images), "--into", str(folder / "out"), "--codecs", "jpeg", "webp",
             "--jobs", "1", "--threads", "1"]
    comparison.main(flags, root)
    yield folder / "out", flags, root
    patch.undo()


def test_any_folder_is_compared_without_published_curves(compared, monkeypatch, capsys):
    """And a second call measures nothing: it writes the same table."""
    out, flags, root = compared
    text = (out / "compare.md").read_text()
    assert f"| {comparison_cases.PAPER}, small" in text and "| WebP (measured)" in text
    assert "Anchor: JPEG (measured)" in text and "VTM" not in text
    assert "broken.png: not a readable image" in text and "published curves are left out" in text
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(own, "run", None)
    monkeypatch.setattr("common.comparison.measured._measure", None)
    monkeypatch.setattr(viewer, "where_bits_go", None)
    comparison.main(flags, root)
    assert (out / "compare.md").read_text() == text
    assert "note: " in capsys.readouterr().out
    content = json.loads((out / "compare.json").read_text())
    assert [c["name"] for c in content["curves"]] == [
        f"{comparison_cases.PAPER}, small", "JPEG (measured)", "WebP (measured)"]
    assert content["reference"] == "JPEG (measured)" and len(content["left_out"]) == 2


def test_further_metrics_are_those_of_the_decoded_images(compared, monkeypatch):
    """What was coded before is not coded again but for classical codecs, whose images are not kept;
    a third call measures nothing.
    """
    piq = pytest.importorskip("piq", reason="needs piq (pip install piq)")
    out, flags, root = compared
    monkeypatch.setattr(own, "run", None)
    comparison.main([*flags, "--metrics", "vif,gmsd"], root)
    text = (out / "compare.md").read_text()
    assert re.search(r"\| +MS-SSIM \| +VIF \| +GMSD \|", text) and "FSIM" not in text
    curves = {c["name"]: c["results"] for c in json.loads((out / "compare.json").read_text())[
        "curves"]}
    paths = data.list_images(out.parent / "set", lambda _: None)
    originals = {p.stem: data.read_image(p, lambda _: None) for p in paths if p.stem != "broken"}
    jpeg = [CODECS["jpeg"].code(x, 50)[1] for x in originals.values()]
    folder = next(out.rglob("kodim05.bin")).parent
    own_point = [data.read_image(folder / f"{stem}.png") for stem in originals]
    i = next(i for i, b in enumerate(curves[f"{comparison_cases.PAPER}, small"]["bpp"])
             if b == pytest.approx(json.loads((folder / "results.json").read_text())["results"][
                 "bpp"][0]))
    for name, at, decoded in (("JPEG (measured)", 9, jpeg),
                              (f"{comparison_cases.PAPER}, small", i, own_point)):
        for key, function in (("vif", piq.vif_p), ("gmsd", piq.gmsd)):
            direct = [float(function(a[None] / 255, b[None] / 255))
                      for a, b in zip(decoded, originals.values(), strict=True)]
            assert curves[name][key][at] == pytest.approx(sum(direct) / 2, rel=1e-5)
    monkeypatch.setattr("common.evaluation.further_metrics.measure", None)
    monkeypatch.setattr("common.comparison.measured._measure", None)
    comparison.main([*flags, "--metrics", "vif,gmsd"], root)
    assert (out / "compare.md").read_text() == text


def test_without_piq_the_rest_is_compared(compared, monkeypatch):
    out, flags, root = compared
    monkeypatch.setattr(further_metrics, "missing", lambda: "pip install piq")
    comparison.main([*flags, "--metrics", "vif,mdsi"], root)
    text = (out / "compare.md").read_text()
    assert "- VIF, MDSI left out: this needs pip install piq" in text and "| VIF" not in text
    assert "JPEG (measured)" in text and f"| {comparison_cases.PAPER}, small" in text


def test_metrics_go_to_the_curve_that_was_coded():
    """Results files hold eight digits; another paper, or another rate, is another curve."""
    results = {"results": {"bpp": [0.123456789, 0.2], "vif": [0.4, 0.5]}}
    bundled = [own.Bundled("a", "small", [], results, [])]
    for paper, rates, taken in (("a", [0.12345679, 0.2], True), ("b", [0.12345679, 0.2], False),
                                ("a", [0.12345679, 0.21], False), ("a", [0.12345679], False)):
        ours = Curve("x", "ours", {"results": {"bpp": rates}}, paper)
        own.take_metrics(ours, bundled, ["vif"])
        assert (ours.results["results"].get("vif") == [0.4, 0.5]) is taken


def test_names_and_scales_of_further_metrics():
    assert further_metrics.chosen("") == []
    for text in ("all", "vif all"):
        assert further_metrics.chosen(text) == list(further_metrics.METRICS)
    assert further_metrics.chosen("mdsi, VIF") == ["mdsi", "vif"]
    with pytest.raises(UserError, match="--metrics lpips: there is no such metric; choose from: v"):
        further_metrics.chosen("vif,lpips")
    assert further_metrics.decibels("vif", 0.99) == pytest.approx(20)
    assert further_metrics.decibels("gmsd", 0.001) == pytest.approx(30)
    assert further_metrics.decibels("mdsi", 0.0) is None
    assert table.head(["vif"])[5:8] == ["MS-SSIM", "VIF", "BD-rate %"]


@pytest.mark.parametrize("key", further_metrics.METRICS)
def test_further_metrics_rank_noise(key):
    """Less noise is better on the scale of curves, and an image of 8x8 pixels has no VIF."""
    pytest.importorskip("piq", reason="needs piq (pip install piq)")
    x = data.read_image(data.KODAK / "kodim05.png")[:, 200:296, 200:296].contiguous()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    values = [further_metrics.measure([key], x, data.to_uint8(x / 255 + s * noise))[key]
              for s in (0.02, 0.1)]
    good, bad = (further_metrics.decibels(key, value) for value in values)
    assert good > bad + 1
    if key == "vif":
        assert further_metrics.measure([key], x[:, :8, :8], x[:, :8, :8]) == {"vif": None}


def test_anchor_and_images_can_be_chosen(compared):
    out, flags, root = compared
    comparison.main([*flags, "--anchor", "WebP (measured)", "--images", "kodim21"], root)
    assert "Anchor: WebP (measured)" in (out / "compare.md").read_text()
    for words, message in ((["--anchor", "VTM"], "--anchor VTM: there is no such curve"),
                           (["--images", "kodim99"], "--images kodim99: there is no such image"),
                           (["--publish"], "--publish: 2 images do not belong on the front page")):
        with pytest.raises(UserError, match=message):
            comparison.main([*flags, *words], root)


# --------------------------------------------------------------------------------- the front page
def test_the_front_page_is_up_to_date():
    """If not: python -m common.comparison --front-page"""
    curves = front_page.curves_of(ROOT, [])
    results, front = ((ROOT / name).read_text() for name in ("RESULTS.md", "README.md"))
    assert table_of(results, front_page.NAME) == front_page.text_of(curves)
    assert table_of(front, front_page.EQUAL) == front_page.at_equal_rate(ROOT, curves)


def test_results_of_other_images_are_not_on_the_front_page(tmp_path):
    paper = tmp_path / "new"
    (paper / "results").mkdir(parents=True)
    for name in ("model.py", "train.py"):
        (paper / name).touch()
    reference = curve([0.3, 0.4], [29.0, 31.0], "theirs").results
    (paper / "results/published.json").write_text(json.dumps(
        {"reference": "theirs", "dataset": "Kodak", "curves": [reference]}))
    for digest in (KODAK, None, "3 images 0123"):
        ours = curve([0.3, 0.4], [27.0, 28.0], "small", N=8, M=12, images_digest=digest).results
        save_results(paper / "results/small.json", ours)  # without steps
        problems = []
        curves = gather.own_results(tmp_path, KODAK, problems)
        shown = re.search(r"8, 12 \| +\| 27.00 \| +29.00 \|",
                          front_page.at_equal_rate(tmp_path, curves))
        assert (shown is not None, len(problems)) == ((True, 0) if digest == KODAK else (False, 1))


def test_the_front_page_is_written_from_files(tmp_path):
    root = comparison_cases.tree(tmp_path)
    (root / "common" / "results").mkdir(parents=True)
    page = root / "RESULTS.md"
    (root / "README.md").write_text("a\n")
    page.write_text("a\n<!-- results: compare -->\n| old |\n\n<!-- end of results -->\nb\n")
    jpeg = curve([0.3, 0.6, 1.2], [26.0, 29.0, 32.0], "JPEG", "classical")
    front_page.save_classical(root, [jpeg])
    comparison.main(["--front-page"], root)
    text = page.read_text()
    assert "| old |" not in text and text.endswith("<!-- end of results -->\nb\n")
    row = next(line for line in text.splitlines() if line.startswith("| JPEG (measured)"))
    vtm = gather.find(gather.published(ROOT, KODAK, []), "VTM")
    assert f"{deltas.delta(vtm, jpeg).rate:+.1f} |" in row
    webp = curve([0.3, 0.6], [27.0, 30.0], "WebP", "classical")
    front_page.save_classical(root, [webp])  # what is not measured this time stays
    kept = load_published(root / "common/results/classical.json")
    assert {c["name"]: c["results"] for c in kept} == {c.name: c.results["results"]
                                                       for c in (jpeg, webp)}
    assert (root / "common/results/compare.png").read_bytes().startswith(b"\x89PNG")
