"""ConvNeXTIC: our file format and that of the source, patches, damaged files."""

import struct

from common import UserError, data
from common.coding import bitstream

import pytest
import torch
from convnextic_cases import lively
from PIL import Image

from convnextic import codec
from convnextic.model import load
from convnextic.variants import BASELINE


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for variant in ("v2_stride2", "v3_scctx", "v5_vr"):
        model = lively(variant)
        options = {key: getattr(model, key) for key in BASELINE}
        options |= {"variant": variant, "lambda_min": 0.0007, "lambda_max": 0.013}
        torch.save({"model": model.state_dict(), "config": options},
                   folder / f"{variant}.pt")
    Image.open(data.KODAK / "kodim23.png").crop((100, 100, 401, 350)).save(folder / "in.png")
    return folder


@pytest.mark.parametrize("variant, strings", [("v2_stride2", 5), ("v3_scctx", 2)])
def test_source_format(variant, strings, weights, tmp_path):
    """Its header, byte for byte, and back: a 301x250 image returns with its size."""
    path, out = tmp_path / "a.bin", tmp_path / "a.png"
    checkpoint = ["--checkpoint", str(weights / f"{variant}.pt")]
    codec.main(["encode", str(weights / "in.png"), "-o", str(path), "--format", "source", "-q", "8",
                *checkpoint])
    file = path.read_bytes()
    assert file[:2] == bytes([0, 7])
    assert struct.unpack(">5I", file[2:22]) == (250, 301, 4, 8, strings)
    parts = codec.unpack_source(file, variable=False)
    assert len(file) == 22 + 4 * strings + sum(map(len, parts.strings))
    assert (parts.metric, parts.quality, parts.size) == ("mse", 8, (250, 301))
    codec.main(["--command=decode", "--input", str(path), "-o", str(out), *checkpoint])
    model = load(weights / f"{variant}.pt")
    x = data.to_float(data.read_image(weights / "in.png"))
    padded = torch.nn.functional.pad(x, (105, 106, 3, 3))[None]  # zeros, centred, to 256x512
    with torch.no_grad():
        expected = model(padded)["x_hat"].clamp(0, 1)[0, :, 3:253, 105:406]
    assert torch.equal(data.read_image(out), data.to_uint8(expected))


def test_metric_and_quality_in_the_header(weights):
    model, x = load(weights / "v2_stride2.pt"), torch.rand(3, 64, 64)
    for metric, quality, code in (("mse", 1, 0x00), ("mse", 8, 0x07), ("ms-ssim", 3, 0x12)):
        assert codec.pack_source(model, x, {}, None, None, quality, metric)[1] == code


@pytest.mark.parametrize("form", ["ours", "source"])
def test_patches_of_a_variable_rate(form, weights, tmp_path):
    """Odd remainders; the rate is in the file."""
    path, out = tmp_path / "a.bin", tmp_path / "a.png"
    checkpoint = ["--checkpoint", str(weights / "v5_vr.pt")]
    codec.main(["encode", str(weights / "in.png"), "-o", str(path), "--format", form, "-lb", "130",
                "-ph", "128", "-pw", "192", *checkpoint])
    codec.main(["decode", str(path), "-o", str(out), *checkpoint])
    model = load(weights / "v5_vr.pt")
    x = data.to_float(data.read_image(weights / "in.png"))
    patches, (top, left) = codec.cut(x, (128, 192), "zeros" if form == "source" else "continued")
    assert len(patches) == 4
    with torch.no_grad():
        a, b, c, d = (model(p[None], 0.013)["x_hat"].clamp(0, 1)[0] for p in patches)
    whole = torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1)
    expected = whole[:, top : top + 250, left : left + 301]
    assert torch.equal(data.read_image(out), data.to_uint8(expected))
    if form == "source":
        header = struct.unpack(">BB6I4I", path.read_bytes()[:42])
        assert header == (0, 2, 250, 301, 128, 192, 1, 130, 2, 3, 4, 2)


def test_quality_is_a_rate_of_a_variable_rate_model(weights, tmp_path, capsys):
    path = tmp_path / "a.bin"
    encode = ["encode", str(weights / "in.png"), "-o", str(path), "--checkpoint",
              str(weights / "v5_vr.pt")]
    for flags, lmbda in (([], 0.0067), (["-q", "1"], 0.0018), (["-q", "4", "-lb", "7"], 0.0007)):
        codec.main([*encode, *flags])
        assert f"lmbda {lmbda:g}" in capsys.readouterr().out
    with pytest.raises(UserError, match="trained for 7 to 130"):
        codec.main([*encode, "-q", "5"])
    with pytest.raises(UserError, match="has one rate"):
        codec.main([*encode[:-1], str(weights / "v2_stride2.pt"), "-lb", "35"])


def test_readme_form_of_the_source(weights, tmp_path):
    path = tmp_path / "compressed.bin"
    codec.main(["encode", "--model", "nic", "-m", "mse", "-q", "1", "-o", str(path),
                str(weights / "in.png"), "--checkpoint", str(weights / "v2_stride2.pt")])
    assert path.read_bytes().startswith(bitstream.MAGIC)
    codec.main(["decode", "-o", str(tmp_path / "out.png"), str(path), "--checkpoint",
                str(weights / "v2_stride2.pt")])
    assert Image.open(tmp_path / "out.png").size == (301, 250)


@pytest.mark.parametrize("change, message", [
    (lambda f: b"\x07" + f[1:], "model 7"), (lambda f: f[:1] + b"\x48" + f[2:], "code 72"),
    (lambda f: f[:-5], "cut short"), (lambda f: f[:10], "cut short"), (lambda f: b"", "empty"),
    (lambda f: f + b"a", "longer than its header"),
    (lambda f: f[:2] + struct.pack(">I", 2**31) + f[6:], "states an image of"),
    (lambda f: f[:10] + struct.pack(">I", 2**30) + f[14:], "does not fit"),
    (lambda f: f[:18] + struct.pack(">I", 2**30) + f[22:], "cut short"),
    (lambda f: f[:18] + struct.pack(">I", 4) + f[22:], "longer than")])
def test_damaged_source_files(change, message, weights, tmp_path):
    path = tmp_path / "a.bin"
    checkpoint = ["--checkpoint", str(weights / "v2_stride2.pt")]
    codec.main(["encode", str(weights / "in.png"), "-o", str(path), "--format", "source",
                *checkpoint])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        codec.main(["decode", str(path), "-o", str(tmp_path / "a.png"), *checkpoint])
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("size, patch, message", [
    ((64, 64), (32768, 32768), "1 patches of 32768x32768"),
    ((65535, 4096), (64, 96), "states patches of 64x96"),
    ((64, 64), (0, 64), "states patches of 0x64"), ((128, 64), (64, 64), "2 strings, 4 are"),
    ((2048, 2048), (2048, 2048), "does not decode")])
def test_source_files_with_absurd_patches(size, patch, message, weights, tmp_path):
    """Consistent headers of a variable rate, and two strings of eight bytes."""
    z = tuple(p // 64 for p in patch)
    head = struct.pack(">BB2I4I2I2I", 0, 2, *size, *patch, 1, 130, *z, 1, 2)
    path = tmp_path / "a.bin"
    path.write_bytes(head + 2 * (struct.pack(">I", 8) + bytes(range(8))))
    with pytest.raises(UserError, match=message):
        codec.main(["decode", str(path), "--checkpoint", str(weights / "v5_vr.pt")])


def test_what_is_encoded_can_be_decoded(weights):
    x, model = torch.rand(3, 200, 100), load(weights / "v5_vr.pt")
    with pytest.raises(UserError, match="give smaller -ph and -pw"):
        codec.check_area(x, (65472, 65472))
    parser_error = pytest.raises(SystemExit)
    with parser_error as e:
        codec.main(["encode", str(weights / "in.png"), "-ph", "65536"])
    assert e.value.code == 2 and model.variable_rate


def test_quality_and_metric_must_be_those_of_the_weights(weights, tmp_path, capsys):
    """-q of a variable rate is its lmbda; of a fixed one, the lmbda that it was trained with."""
    state = torch.load(weights / "v2_stride2.pt", weights_only=True)
    state["config"] |= {"lmbda": 0.0932, "metric": "ms-ssim"}
    torch.save(state, tmp_path / "q7.pt")
    encode = ["encode", str(weights / "in.png"), "-o", str(tmp_path / "a.bin"), "--format",
              "source", "--checkpoint", str(tmp_path / "q7.pt")]
    for flags in ([], ["-q", "7"], ["-m", "ms-ssim"]):
        codec.main([*encode, *flags])
        assert (tmp_path / "a.bin").read_bytes()[1] == 0x16
    with pytest.raises(UserError, match=r"-q 3: means lmbda 0.0067.* 0.0932 \(-q 7\)"):
        codec.main([*encode, "-q", "3"])
    with pytest.raises(UserError, match="-m mse: these weights were trained for ms-ssim"):
        codec.main([*encode, "-m", "mse"])
    with pytest.raises(UserError, match="v5_vr --quality_level 6` and name them"):
        codec.main(["encode", str(weights / "in.png"), "-o", str(tmp_path / "b.bin"), "-q", "6"])
    with pytest.raises(UserError, match="cannot read .: it is a folder"):
        codec.main(["encode", "."])


@pytest.mark.parametrize("form", ["ours", "source"])
def test_patches_are_at_most_as_large_as_the_image(form, weights, tmp_path):
    """301x250 is coded in 320x256 at most, and one side alone gives strips."""
    encode = ["encode", str(weights / "in.png"), "--format", form, "-lb", "130", "--checkpoint",
              str(weights / "v5_vr.pt")]
    files = {}
    for name, flags in (("whole", []), ("large", ["-ph", "1088", "-pw", "1408"]),
                        ("strips", ["-ph", "128"])):
        path = tmp_path / f"{name}.bin"
        codec.main([*encode, *flags, "-o", str(path)])
        files[name] = path.read_bytes()
    assert files["large"] == files["whole"]
    at = 10 if form == "source" else None
    patch = (struct.unpack(">2I", files["strips"][at : at + 8]) if at else
             struct.unpack("<2I", bitstream.unpack(files["strips"], b"cnxt").parameters[:8]))
    assert patch == (128, 320)
