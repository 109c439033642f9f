"""Coding whole folders for real: sizes, bytes on disk, results files, tables."""

import json
import math

from common import UserError, data, metrics
from common.coding import bitstream, image_file
from common.evaluation import classical, compare, evaluate, image_sets
from common.evaluation.results import (
    load_published,
    load_results,
    merge_points,
    operating_point,
    save_results,
)

import pytest
import torch
from helpers import FactorizedPrior, ScaleHyperprior, factorized_model


@pytest.fixture(scope="module")
def model():
    return factorized_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images of equal size and one of another, smooth enough for JPEG to gain something."""
    path = tmp_path_factory.mktemp("images")
    torch.manual_seed(1)
    for name, size in (("b", (50, 70)), ("a", (50, 70)), ("c", (170, 165))):
        coarse = torch.rand(1, 3, 5, 6)
        smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
        data.write_image(smooth[0], path / f"{name}.png")
    return path


@pytest.mark.parametrize("kind", [FactorizedPrior, ScaleHyperprior])
@pytest.mark.parametrize("size", [(1, 1), (33, 100)])
def test_round_trip_of_any_size(kind, size):
    """The file gives what the model itself reconstructs, without the padding."""
    torch.manual_seed(0)
    net = kind(8, 12).eval()
    net.update()
    x = torch.rand(3, *size)
    file = image_file.encode_image(net, x)
    out = net.compress(image_file.pad(x[None], net.downsampling_factor))
    expected = net.decompress(out["strings"], out["shape"])["x_hat"][0, :, : size[0], : size[1]]
    assert torch.equal(image_file.decode_image(net, file), expected)
    assert len(file) - sum(len(s[0]) for s in out["strings"]) <= 32


def test_images_of_a_batch_are_coded_as_if_alone(model):
    x = torch.rand(3, 3, 40, 50)
    files = image_file.encode_images(model, x)
    assert files == [image_file.encode_image(model, one) for one in x]
    x_hat = image_file.decode_images(model, files)
    assert torch.allclose(x_hat[1], image_file.decode_image(model, files[1]), atol=1e-6)


def test_decoding_errors_are_user_errors(model):
    file = image_file.encode_image(model, torch.rand(3, 20, 20))
    with pytest.raises(UserError, match="--checkpoint"):
        image_file.decode_image(FactorizedPrior(8, 12).eval(), file)
    own = bitstream.fingerprint(model)
    three = bitstream.pack(model.tag, own, 20, 20, [b"x", b"y", b"z"])

    class Strict(FactorizedPrior):  # what our models do with sections they do not know

        def decompress(self, strings, shape):
            (y_strings,) = strings

    with pytest.raises(UserError, match="does not decode"):
        image_file.decode_image(Strict(8, 12), three, own)
    not_updated = FactorizedPrior(8, 12).eval()
    with pytest.raises(UserError, match="cannot code"):
        image_file.encode_image(not_updated, torch.rand(3, 20, 20))


def test_model_of_finds_the_weights(model):
    torch.manual_seed(5)
    other = FactorizedPrior(8, 12).eval()
    other.update()
    stored = {"other.pth": other, "right.pth": model}
    file = image_file.encode_image(model, torch.rand(3, 20, 20))

    def load(path, device):
        return stored[path]

    assert image_file.find_model(file, FactorizedPrior, stored, load, torch.device("cpu")) is model
    with pytest.raises(UserError, match=bitstream.fingerprint(other).hex()):
        image_file.find_model(file, FactorizedPrior, ["other.pth"], load, torch.device("cpu"))


def test_evaluate_counts_bytes_on_disk(model, folder, tmp_path):
    paths = data.list_images(folder)
    result = evaluate.evaluate(model, paths, "tiny", out_dir=tmp_path,
                               meta={"lmbda": 0.01, "steps": 5})
    rows = result["per_image"][0]
    assert [r["image"] for r in rows] == ["a", "b", "c"]
    for r, path in zip(rows, paths, strict=True):
        original, decoded = data.read_image(path), data.read_image(tmp_path / f"{path.stem}.png")
        size = (tmp_path / f"{path.stem}.bin").stat().st_size
        assert r["bytes"] == size
        assert r["bpp"] == 8 * size / (original.shape[1] * original.shape[2])
        assert r["psnr-rgb"] == metrics.psnr(original, decoded)
        assert r["encoding_time"] > 0 and r["decoding_time"] > 0
    assert math.isnan(rows[0]["ms-ssim-rgb"]) and 0 < rows[2]["ms-ssim-rgb"] < 1
    mean = sum(r["psnr-rgb"] for r in rows) / 3
    assert result["results"]["psnr-rgb"] == [pytest.approx(mean)]
    meta = result["meta"]
    assert (meta["lmbda"], meta["steps"], meta["images"]) == ([0.01], [5], [3])
    assert (meta["N"], meta["M"]) == ([8], [12])
    assert meta["fingerprint"] == [bitstream.fingerprint(model).hex()]


def test_evaluate_in_batches_gives_the_same_files(model, folder):
    paths = data.list_images(folder)
    one = evaluate.evaluate(model, paths, "tiny")
    two = evaluate.evaluate(model, paths, "tiny", batch_size=2, entropy_estimation=False)
    assert [r["bytes"] for r in one["per_image"][0]] == [r["bytes"] for r in two["per_image"][0]]
    assert two["results"]["bpp_estimated"] == [None]
    assert one["results"]["bpp_estimated"][0] > 0


def test_estimate_is_close_to_the_file(model):
    """Untrained weights, many symbols: coded bits and -log2 likelihoods agree."""
    x = torch.rand(1, 3, 256, 256)
    bits = 8 * (len(image_file.encode_image(model, x)) - 26)
    assert bits == pytest.approx(evaluate._estimate(model, x)[0] * 256 * 256, rel=0.02)


def test_evaluate_without_images(model):
    with pytest.raises(UserError, match="no images"):
        evaluate.evaluate(model, [], "tiny")


def test_merge_sorts_by_rate_and_keeps_points_together():
    rows = {rate: [{"image": "a", "bpp": rate, "psnr-rgb": 30 + rate}] for rate in (0.5, 0.2, 0.9)}
    points = [operating_point("x", "", rows[rate], {"lmbda": rate / 10}) for rate in rows]
    points[0]["meta"]["steps"] = [7]
    merged = merge_points(points)
    assert merged["results"]["bpp"] == [0.2, 0.5, 0.9]
    assert merged["results"]["psnr-rgb"] == [30.2, 30.5, 30.9]
    assert merged["meta"]["lmbda"] == [0.02, 0.05, 0.09]
    assert merged["meta"]["steps"] == [None, 7, None]
    assert merged["per_image"] == [rows[0.2], rows[0.5], rows[0.9]]
    assert merge_points([merged])["results"] == merged["results"]


def test_save_json_is_strict_and_has_a_line_per_image(tmp_path):
    rows = [{"image": n, "bpp": 1 / 3, "psnr-rgb": 30.0, "ms-ssim-rgb": math.nan} for n in "ab"]
    path = tmp_path / "new" / "results.json"
    save_results(path, operating_point("x", "a \"name\"", rows, {"steps": 20_000_000}))

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read["results"]["bpp"] == [pytest.approx(1 / 3, abs=1e-7)]
    assert read["results"]["ms-ssim-rgb"] == [None]
    assert read["meta"]["steps"] == [20_000_000]
    assert sum('"image"' in line for line in path.read_text().splitlines()) == 2
    assert load_results(path) == read
    with pytest.raises(UserError, match="not a results JSON"):
        path.write_text("{")
        load_results(path)


@pytest.mark.parametrize(("block", "key", "values", "words"), [
    ("results", "bpp", [0.1, 0], "bpp: give at least one rate, and only positive ones"),
    ("results", "bpp", [0.1, math.nan], "bpp: NaN is not a number"),
    ("results", "psnr-rgb", [30], "psnr-rgb has 1 entries, bpp has 2"),
    ("results", "ms-ssim-rgb", ["x", 1], 'ms-ssim-rgb: "x" is not a number'),
    ("meta", "lmbda", [0.01], "lmbda has 1 entries, bpp has 2"),
    ("meta", "lmbda", ["0.01", 0.02], 'lmbda: "0.01" is not a number'),
    ("meta", "steps", True, "steps: true is not a number")])
def test_wrong_values_of_a_results_json_are_named(block, key, values, words, tmp_path):
    content = {"name": "x", "results": {"bpp": [0.1, 0.2], "psnr-rgb": [30, None]}, "meta": {}}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    load_results(path)
    content[block][key] = values
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load_results(path)
    assert words in str(error.value)


def test_jpeg_through_the_same_measures(folder):
    paths = data.list_images(folder)
    result = classical.jpeg(paths, qualities=(90, 10))
    assert result["meta"]["quality"] == [10, 90]
    low, high = result["results"]["psnr-rgb"]
    assert low < high
    row = result["per_image"][0][0]
    assert row["bpp"] == 8 * row["bytes"] / (50 * 70)


def curve(name, rates, psnrs, **meta):
    return {"name": name, "results": {"bpp": rates, "psnr-rgb": psnrs}, "meta": meta}


@pytest.fixture
def curves():
    """Straight lines over log rate: ours 1 dB above JPEG and 2 dB below the published one."""
    rates = [0.1, 0.2, 0.4, 0.8, 1.6]

    def line(offset):
        return [offset + 10 * math.log10(r) for r in rates]

    ours = curve("ours", [0.2, 0.4], [31 + 10 * math.log10(r) for r in (0.2, 0.4)], N=64, M=96,
                 steps=[20_000, 20_000], steps_source=2_000_000, lmbda=[0.0067, 0.013])
    return [ours], [curve("reference", rates, line(33)), curve("short", [0.8, 1.6], [30, 33])], \
        curve("JPEG", rates, line(30))


def test_table(curves):
    text = compare.table(*curves)
    row = next(line for line in text.splitlines() if "0.0067" in line)
    assert "ours (lmbda 0.0067; N=64, M=96; 20,000 of 2 M steps)" in row
    assert [c.strip() for c in row.split("|")[2:7]] == ["0.2000", "24.01", "-", "+1.00", "-2.00"]
    assert "BD-rate of ours against reference: +58.5 %" in text  # 10^0.2
    rows = [line for line in text.splitlines() if line.startswith("| reference")]
    assert [r.split("|")[2].strip() for r in rows] == ["0.2000", "0.4000"]  # nearest to ours
    same = [c.strip() for c in text.split("PSNR at the same rate")[1].splitlines()[2].split("|")]
    assert same[2:7] == ["0.2000", "24.01", "26.01", "-", "23.01"]


def test_table_without_common_range(curves):
    (ours,), _, jpeg = curves
    far = curve("far", [2.0, 4.0], [50.0, 60.0])
    assert "far: no common range" in compare.table([ours], [far], jpeg)
    single = curve("single", [0.3], [25.0])
    assert "BD-rate" not in compare.table([single], [far], jpeg)


def test_compare_command(curves, folder, tmp_path, capsys):
    results, published, _ = curves
    digest = image_sets.digest_of(classical.jpeg(data.list_images(folder), (50,)))
    save_results(tmp_path / "ours.json", results[0] | {"meta": {"images_digest": digest}})
    save_results(tmp_path / "published.json", {
        "dataset": "three images of noise", "images_digest": digest,
        "reference": published[0]["name"], "curves": published})
    compare.main(["--results", str(tmp_path / "ours.json"),
                  "--published", str(tmp_path / "published.json"),
                  "--dataset", str(folder), "--plot", str(tmp_path / "rd.png")])
    assert "BD-rate of ours against reference" in capsys.readouterr().out
    assert data.read_image(tmp_path / "rd.png").shape[0] == 3


def test_compare_tells_papers_with_equal_names_apart(curves, folder, tmp_path, capsys):
    ours = curves[0][0]
    for paper in ("one", "two"):
        save_results(tmp_path / paper / "results" / "small.json", ours)
    files = [str(path) for path in sorted(tmp_path.glob("*/results/small.json"))]
    compare.main(["--results", *files, "--dataset", str(folder)])
    table = capsys.readouterr().out
    assert f"| one {ours['name']}" in table and f"| two {ours['name']}" in table


@pytest.mark.parametrize("content", [
    "{}", "[1]", "3", '{"name": "a", "results": {"bpp": [1]}}', '{"name": "a", "results": 3}',
    '{"name": "a", "results": {"bpp": ["1"], "psnr-rgb": [2]}}', '{"curves": [{}]}', "not JSON"])
def test_other_json_is_refused(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    for read in (load_results, load_published):
        with pytest.raises(UserError, match="a.json: not"):
            read(tmp_path / "a.json")


@pytest.mark.parametrize("name, words", [("a.xyz", "name a plot"), ("", "it is a folder")])
def test_plots_that_cannot_be_written(name, words, curves, tmp_path):
    results, published, jpeg = curves
    with pytest.raises(UserError, match=words):
        compare.plot(results, published, jpeg, tmp_path / name)
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}.*"))


def test_the_reference_is_named(tmp_path):
    """published.json must name its reference, which comes first whatever its place in the file."""
    curves = [{"name": name, "results": {"bpp": [0.1], "psnr-rgb": [30.0]}} for name in "abc"]
    path = tmp_path / "published.json"
    path.write_text(json.dumps({"reference": "b", "curves": curves}))
    assert [curve["name"] for curve in load_published(path)] == ["b", "a", "c"]
    for wrong in ({}, {"reference": "d"}):
        path.write_text(json.dumps(wrong | {"curves": curves}))
        with pytest.raises(UserError, match="must name the curve"):
            load_published(path)
