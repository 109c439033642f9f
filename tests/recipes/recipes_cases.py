"""A paper without networks, whose scripts do what ours do, for tests of `make weights`."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
WEIGHTS = """
images: two tiles
train: {dataset: --dataset, start: --init_ckpt, resume: [--resume]}
eval: {dataset: --dataset_path}
stages:
  "0.013":
    steps: 30
    hours: 0.1
    folders: ["ckpts/{run}/13", "logs/{run}/13"]
    checkpoint: epoch_*.pth
    flags: {prefix: "{run}/13", lr: 0.001, epoch: 3}
  "0.0035":
    from: "0.013"
    steps: 20
    hours: 0.1
    folders: ["ckpts/{run}/35", "logs/{run}/35"]
    checkpoint: epoch_*.pth
    flags: {prefix: "{run}/35", lr: 0.0005, epoch: 2, test_images: "{images}"}
curves:
  small:
    files: {small-0.0035.pth: "0.0035", small-0.013.pth: "0.013"}
short:
  steps: 10
  flags: {epoch: 1}
"""
TRAIN = """
import argparse, hashlib, os, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for flag in ("config", "prefix", "lr", "dataset", "init_ckpt", "threads", "device", "test_images"):
    parser.add_argument(f"--{flag}")
parser.add_argument("--epoch", type=int)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
folder, logs = Path("ckpts", args.prefix), Path("logs", args.prefix)
folder.mkdir(parents=True, exist_ok=True)
logs.mkdir(parents=True, exist_ok=True)
if Path("diverges").exists():
    sys.exit("error: loss not finite in the batch of step 3")
start = Path(args.init_ckpt).read_text() if args.init_ckpt else ""
done = sorted(folder.glob("epoch_*.pth"))
text = done[-1].read_text() if done and args.resume else start
for epoch in range(len(done), args.epoch):
    time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))
    text = hashlib.sha256(f"{text} {args.lr} {epoch}".encode()).hexdigest()
    part = folder / "part"
    try:
        part.write_text(text + " " * int(os.environ.get("FAKE_SIZE", 0)))
    except OSError as e:
        sys.exit(f"error: cannot write {folder}/epoch_{epoch}.pth: {e.strerror}")
    part.rename(folder / f"epoch_{epoch}.pth")
    with open(logs / "log.txt", "a") as f:
        f.write(f"epoch {epoch}  step {10 * (epoch + 1)}  train loss 1.5 bpp 0.5\\n")
"""
EVAL = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--resultdir") + 1])
folder.mkdir(parents=True)
(folder / "Fake-small.json").write_text(json.dumps(sys.argv[1:]))
(folder / "rd.png").touch()
"""
EXPORT = """
import sys
from pathlib import Path
paper, checkpoint, _, output, _, steps = sys.argv[1:]
Path(output).write_text(f"{Path(checkpoint).read_text()} {steps}")
"""
CURVES = """
import sys
from pathlib import Path
words = sys.argv[1:]
Path(words[-1]).write_text(" ".join(words[:-2]))
"""
PAGES = """
import shutil, sys
from pathlib import Path
into = Path(sys.argv[5])
into.mkdir(exist_ok=True)
shutil.copy(sys.argv[3], into / f"{sys.argv[2]}.json")
(into / f"{sys.argv[2]}.png").touch()
"""


def change(root, old, new, file="weights.yaml"):
    text = (root / "fake" / file).read_text()
    assert old in text
    (root / "fake" / file).write_text(text.replace(old, new))


def result(root):
    return {p.name: p.read_bytes() for p in (root / "fake" / "weights").glob("*.pth")}
