"""What holds for every paper's folder because it exists: CONTRIBUTING.md, "Add a paper".

The bundled weights are used. A folder without any is skipped here; tests/test_new_paper.py shows
that such a folder trains, codes and evaluates.
"""

import copy
import importlib
import json
from pathlib import Path

from common import UserError, data
from common.coding import bitstream, image_file
from common.coding.contract import Codec
from common.papers import papers
from common.recipes.recipe_file import as_list, read_recipe

import forks
import pytest
import torch

ROOT = Path(__file__).parents[2]
PAPERS = papers()
HEADER = 48  # bytes of the header, and of the coder's final states


def bundled(paper):
    return sorted((ROOT / paper / "weights").glob("*.pth"))


@pytest.fixture(scope="module", params=PAPERS)
def paper(request):
    if not bundled(request.param):
        pytest.skip("no bundled weights")
    return request.param


@pytest.fixture(scope="module")
def model(paper):
    return importlib.import_module(f"{paper}.model").load(bundled(paper)[0])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two crops of a photograph, of which one has odd sides."""
    folder = tmp_path_factory.mktemp("images")
    x = data.read_image(data.KODAK / "kodim23.png")
    for name, height, width in (("a", 128, 192), ("b", 77, 101)):
        data.write_image(x[:, 100 : 100 + height, 200 : 200 + width], folder / f"{name}.png")
    return folder


def call(paper, script, *words):
    """Call the main function of a script of the folder, in this process."""
    importlib.import_module(f"{paper}.{script}").main([*map(str, words), "--threads", "1"])


@pytest.fixture(scope="module")
def coded(paper, images, tmp_path_factory):
    """The file of b.png, made by codec.py with its defaults."""
    path = tmp_path_factory.mktemp(paper) / "b.bin"
    call(paper, "codec", "encode", images / "b.png", "-o", path)
    return path


@pytest.mark.parametrize("name", PAPERS)
def test_every_module_can_be_imported(name):
    """Also those that no other test uses: of a bench.py, the imports may be out of date."""
    for path in sorted((ROOT / name).glob("*.py")):
        if path.stem != "common":  # the link to the package `common`, for scripts in the folder
            importlib.import_module(f"{name}.{path.stem}")


def test_it_is_a_codec(paper, model):
    assert isinstance(model, Codec) and len(model.tag) == 4
    parts = dict(model.named_modules())
    assert set(model.exact_parts) <= set(parts)
    assert model.provenance.step and model.provenance.config


def test_its_tag_is_its_own():
    tags = {}
    for name in filter(bundled, PAPERS):
        tags.setdefault(importlib.import_module(f"{name}.model").load(bundled(name)[0]).tag, name)
    assert len(tags) == sum(1 for name in PAPERS if bundled(name))


def test_fingerprint_survives_a_copy(model):
    """Weights, tables and options make the fingerprint: the device and the object do not."""
    assert bitstream.fingerprint(copy.deepcopy(model)) == bitstream.fingerprint(model)


def test_file_decodes_here_and_elsewhere(paper, coded, tmp_path):
    """In another process, with other instructions: the same image, but for the rounding of g_s."""
    call(paper, "codec", "decode", coded, "-o", tmp_path / "here.png")
    forks.run("codec.py", "decode", coded, "-o", tmp_path / "there.png", cwd=ROOT / paper,
                  libraries={"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default"})
    here, there = (data.read_image(tmp_path / f"{name}.png").int() for name in ("here", "there"))
    assert here.shape == (3, 77, 101)
    assert (here - there).abs().max() <= 1


def test_files_are_as_large_as_estimated(paper, images, tmp_path, monkeypatch):
    """eval.py, every operating point of the first weights: within 1 % and the header."""
    monkeypatch.chdir(ROOT / paper)
    recipe = ROOT / paper / "weights.yaml"
    flag = as_list(read_recipe(recipe)["eval"]["dataset"]) if recipe.exists() else ["--dataset"]
    call(paper, "eval", *flag, images, "--checkpoint", bundled(paper)[0], "--resultdir", tmp_path,
         "--outdir", tmp_path / "output")
    path, = tmp_path.glob("*.json")
    rows = [row for rows in json.loads(path.read_text())["per_image"] for row in rows]
    assert rows and (tmp_path / "rd.png").exists()
    for row in rows:
        header = 8 * HEADER / (row["height"] * row["width"])
        difference = row["bpp"] - row["bpp_estimated"]
        assert -0.02 * row["bpp"] <= difference <= 0.01 * row["bpp"] + header, row


@pytest.mark.parametrize("broken", ["empty", "foreign", "truncated", "altered"])
def test_broken_files_are_named_in_one_line(paper, coded, tmp_path, broken):
    """And no image is written."""
    file = coded.read_bytes()
    content = {"empty": b"", "foreign": b"no file of ours", "truncated": file[:-3],
               "altered": file[:30] + bytes([file[30] ^ 1]) + file[31:]}[broken]
    (tmp_path / "broken.bin").write_bytes(content)
    with pytest.raises(UserError) as error:
        call(paper, "codec", "decode", tmp_path / "broken.bin", "-o", tmp_path / "x.png")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.png").exists()


def test_files_of_other_papers_are_refused(paper, model, coded):
    """By the tag, before any weights are compared."""
    other = next(name for name in PAPERS if name != paper and bundled(name))
    theirs = importlib.import_module(f"{other}.model").load(bundled(other)[0])
    with pytest.raises(UserError, match="other folder"):
        image_file.decode_image(theirs, coded.read_bytes())


@pytest.mark.parametrize("script", ["train", "eval", "codec"])
def test_unknown_flags_are_one_line(paper, script, capsys):
    with pytest.raises(SystemExit) as status:
        call(paper, script, *(["encode", "x.png"] if script == "codec" else []), "--no-such")
    error = capsys.readouterr().err
    assert status.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1


def test_broken_weights_are_named(paper, tmp_path):
    path = tmp_path / "cut.pth"
    path.write_bytes(bundled(paper)[0].read_bytes()[:-1000])
    with pytest.raises(UserError, match="cut.pth"):
        importlib.import_module(f"{paper}.model").load(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="cut.pth"):
        importlib.import_module(f"{paper}.model").load(path)
