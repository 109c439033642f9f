"""The command `licodecs`: the codecs of all papers.

    licodecs encode photo.jpg -o photo.bin --paper joint_ar --lmbda 0.013
    licodecs decode photo.bin -o decoded.png       finds paper and weights by the file's header
    licodecs eval --paper joint_ar --images FOLDER real files of a folder of images
    licodecs info FILE                             what a .bin file or a checkpoint is
    licodecs papers                                the papers and their bundled weights

encode, decode and eval run the codec.py and eval.py of the paper and take their flags;
`licodecs encode --paper joint_ar --help` lists them.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from common import UserError, cli
from common.coding import codec_cli, codecs, describe
from common.files import read_file
from common.papers import ROOT
from common.recipes.recipe_file import as_list, read_recipe


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    if words[0] not in COMMANDS:
        raise UserError(f"no command {words[0]!r}: choose from {', '.join(COMMANDS)}")
    COMMANDS[words[0]](words[1:])


def _split(words: list[str], *names: str) -> tuple[dict[str, str | None], list[str]]:
    """The values of flags of ours, and all other words, which are for the paper's script."""
    parser = cli.Parser(add_help=False)
    for name in names:
        parser.add_argument(f"--{name}")
    found, rest = parser.parse_known_args(words)
    return vars(found), rest


def _shows_help(paper: str | None, rest: list[str]) -> bool:
    """Whether --help is asked for without a paper, whose script would answer; it is printed."""
    asked = paper is None and bool({"-h", "--help"} & {*rest})
    if asked:
        print(__doc__.strip())
    return asked


def _script(paper: str, script: str, words: list[str]) -> None:
    importlib.import_module(f"{paper}.{script}").main(words)


def encode(words: list[str]) -> None:
    """codec.py encode of --paper."""
    flags, rest = _split(words, "paper")
    if _shows_help(flags["paper"], rest):
        return
    _script(codecs.check_paper(flags["paper"]), "codec", ["encode", *rest])


def decode(words: list[str]) -> None:
    """codec.py decode of the paper that wrote the file; --paper is for formats without a header."""
    flags, rest = _split(words, "paper")
    paper = flags["paper"]
    if _shows_help(paper, rest):
        return
    if paper is None:
        known, others = codec_cli.flags("")[0].parse_known_args(["decode", *rest])
        candidates = [known.input, *map(Path, others)]  # the input, or the value of a paper's flag
        path = next((path for path in candidates if path.is_file()), known.input)
        try:
            paper = codecs.paper_of(read_file(path))
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
    _script(codecs.check_paper(paper), "codec", ["decode", *rest])


def evaluate(words: list[str]) -> None:
    """eval.py of --paper; --images is its flag for the folder of test images."""
    flags, rest = _split(words, "paper", "images")
    if _shows_help(flags["paper"], rest):
        return
    paper = codecs.check_paper(flags["paper"])
    if flags["images"] is not None:
        recipe = read_recipe(ROOT / paper / "weights.yaml")
        rest = [*map(str, as_list(recipe["eval"]["dataset"])), flags["images"], *rest]
    _script(paper, "eval", rest)


def info(words: list[str]) -> None:
    """What each file is, and what to type next."""
    parser = cli.Parser(prog="licodecs info", description="Say what files are, and what to type.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE",
                        help=".bin file, checkpoint, or results JSON")
    for path in parser.parse_args(words).files:
        print("\n".join(describe.describe(path)))


def papers(words: list[str]) -> None:
    """The papers, and the names of their bundled weights."""
    cli.Parser(prog="licodecs papers", description="List the papers.").parse_args(words)
    for paper in codecs.papers():
        names = ", ".join(codecs.bundled(codecs.weights_folder(paper))) or "no bundled weights"
        print(f"{paper:14s} {names}")


COMMANDS = {"encode": encode, "decode": decode, "eval": evaluate, "info": info, "papers": papers}
