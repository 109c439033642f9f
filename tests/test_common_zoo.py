"""--pretrained: CompressAI's published weights, here served on the loopback address."""

import hashlib
import http.server
import io
import json
import threading
from functools import partial

from common import UserError, data
from common.coding import zoo
from common.coding.model_file import load_checkpoint

import numpy as np
import pytest
import torch
from compressai.models import (
    Cheng2020Attention,
    FactorizedPrior,
    JointAutoregressiveHierarchicalPriors,
    ScaleHyperprior,
)
from compressai.zoo import image as published

import factorized.codec
import factorized.eval
import factorized.train
import hyperprior.codec
import joint_ar.codec
import qvrf.codec
import qvrf.eval
import qvrf.train


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """publish(architecture, model): serve its weights, spelt as in the zoo, as quality 3."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def publish(architecture, model, legacy=True):
        torch.manual_seed(0)
        model.update()
        state, content = model.state_dict(), io.BytesIO()
        for name in ("matrices", "biases", "factors"):
            state = {k.replace(f"bottleneck.{name}.", f"bottleneck._{name}."): v
                     for k, v in state.items()}
        torch.save(state, content, _use_new_zipfile_serialization=not legacy)
        mark = hashlib.sha256(content.getvalue()).hexdigest()[:8]
        path = folder / f"{architecture}-3-{mark}.pth.tar"
        path.write_bytes(content.getvalue())
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        monkeypatch.setitem(published.model_urls[architecture]["mse"], 3, url)
        widths = (model.N, getattr(model, "M", model.N))
        monkeypatch.setitem(published.cfgs[architecture], 3, widths)
        return path

    yield publish
    server.shutdown()
    server.server_close()


@pytest.fixture
def image(tmp_path):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 70, 80), dtype=np.uint8))
    for folder in ("train", "test"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        data.write_image(x, tmp_path / "images" / folder / "a.png")
    return tmp_path / "images" / "test" / "a.png"


@pytest.mark.parametrize("module, flags, architecture, make", [
    (factorized.codec, (), "bmshj2018-factorized", lambda: FactorizedPrior(4, 6)),
    (hyperprior.codec, (), "bmshj2018-hyperprior", lambda: ScaleHyperprior(4, 6)),
    (joint_ar.codec, (), "mbt2018", lambda: JointAutoregressiveHierarchicalPriors(4, 6)),
    (qvrf.codec, ("--model", "balle"), "bmshj2018-hyperprior", lambda: ScaleHyperprior(4, 6)),
    (qvrf.codec, ("--model", "minnen"), "mbt2018",
     lambda: JointAutoregressiveHierarchicalPriors(4, 6)),
    (qvrf.codec, (), "cheng2020-attn", lambda: Cheng2020Attention(8))])
def test_codec_downloads_converts_and_codes(module, flags, architecture, make, serve, image,
                                            tmp_path, capsys):
    original = make()
    served = serve(architecture, original)
    words = ["--pretrained", "3", "--device", "cpu", *flags]
    module.main(["encode", str(image), "-o", "a.bin", *words])
    served.unlink()  # the second time, nothing is downloaded
    module.main(["decode", "a.bin", "-o", "b.png", *words])
    converted, = (tmp_path / "ckpts" / "pretrained").iterdir()
    module.main(["decode", "a.bin", "-o", "c.png", "--checkpoint", str(converted)])
    decoded = data.read_image(tmp_path / "b.png")
    assert torch.equal(decoded, data.read_image(tmp_path / "c.png"))
    assert "converted from" in capsys.readouterr().out
    state = load_checkpoint(converted)
    assert state["config"]["lmbda"] == 0.0067 and set(state["exact"]) <= {
        "h_s", "context_prediction", "entropy_parameters"}
    table = "entropy_bottleneck._quantized_cdf"  # that of the published file, not a new one
    assert torch.equal(state["model"][table], original.state_dict()[table])


def test_eval_measures_published_weights(serve, image, tmp_path):
    serve("bmshj2018-factorized", FactorizedPrior(4, 6), legacy=False)
    factorized.eval.main(["--pretrained", "3", "--dataset_path", str(image.parent)])
    serve("bmshj2018-hyperprior", ScaleHyperprior(4, 6))
    qvrf.eval.main(["--pretrained", "3", "--model", "balle", "--dataset", str(image.parent)])
    found = [json.loads(p.read_text()) for p in (tmp_path / "results").glob("*.json")]
    points = [len(curve["results"]["bpp"]) for results in found
              for curve in (results if isinstance(results, list) else [results])]
    assert points and set(points) == {1}  # qvrf: the level that is published


@pytest.mark.parametrize("other", [("--load_model_epoch", "0"), ("--checkpoint", "a.pth"),
                                   ("--reproduce", "--config", "a.yaml")])
def test_one_source_of_weights(other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--pretrained, {other[0]}: give one of them"):
        factorized.eval.main(["--pretrained", "3", *other])
    if other[0] == "--checkpoint":
        with pytest.raises(UserError, match="--checkpoint, --load_model_epoch: give one of them"):
            factorized.eval.main([*other, "--epoch_num", "0"])


def test_training_starts_from_published_weights(serve, image, tmp_path):
    torch.manual_seed(1)
    original = FactorizedPrior(4, 6)
    serve("bmshj2018-factorized", original)
    common = ["--patch-size", "64", "--steps-per-epoch", "1", "--device", "cpu"]
    factorized.train.main(["--pretrained", "3", "--epoch", "1", "--batch_size", "1", "--lr",
                           "1e-12", "--test_dataset", str(image.parent), *common])
    state = load_checkpoint(tmp_path / "ckpts" / "FactorizedPrior" / "0" / "epoch_0.pth")
    weights = original.state_dict()["g_a.0.weight"]
    assert torch.allclose(state["model"]["g_a.0.weight"], weights, atol=1e-6)
    assert (state["config"]["N"], state["config"]["M"]) == (4, 6)
    original = ScaleHyperprior(4, 6)
    serve("bmshj2018-hyperprior", original)
    qvrf.train.main(["--pretrained", "3", "--model", "balle", "-e", "1", "-lr", "1e-12", "-n", "0",
                     "--batch-size", "1", "--patch-size", "64", "64", "--stage", "2",
                     "--steps-per-epoch", "1", "--out", "run", "-d", "images"])
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")
    weights = original.state_dict()["g_a.0.weight"]
    assert torch.allclose(state["model"]["g_a.0.weight"], weights, atol=1e-6)
    with pytest.raises(UserError, match="give one of them"):
        factorized.train.main(["--pretrained", "3", "--init_ckpt", "x.pth"])


def test_a_wrong_file_no_network_and_no_such_quality(serve, image, monkeypatch):
    served = serve("bmshj2018-factorized", FactorizedPrior(4, 6))
    content = served.read_bytes()
    words = ["encode", str(image), "--pretrained", "3"]
    served.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match="cannot download .*invalid hash"):
        factorized.codec.main(words)
    served.unlink()
    with pytest.raises(UserError, match="cannot download .*404"):
        factorized.codec.main(words)
    kept = zoo.Path(torch.hub.get_dir(), "checkpoints", served.name)
    kept.write_bytes(content[:100])  # a download that was cut short is repeated
    served.write_bytes(content)
    assert zoo.download("bmshj2018-factorized", "3") == kept and kept.read_bytes() == content
    kept.unlink()
    monkeypatch.setitem(published.model_urls["bmshj2018-factorized"]["mse"], 3,
                        "http://127.0.0.1:9/a-3-01234567.pth.tar")
    with pytest.raises(UserError, match="cannot download") as caught:
        factorized.codec.main(words)
    assert "\n" not in str(caught.value) and str(kept.parent) in str(caught.value)
    with pytest.raises(UserError, match="qualities 1 to 6"):
        zoo.download("cheng2020-attn", "8")
    for text in ("9", "0", "mse-3", "ms-ssim-9", ""):
        with pytest.raises(ValueError):
            zoo.quality(text)
    assert zoo.quality("ms-ssim-3") and zoo.metric_of("ms-ssim-3") == "ms-ssim"
