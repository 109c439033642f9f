"""Which images a curve was measured on; only curves of the same images are compared.

Images are identified by their decoded pixels, so a copy of Kodak in other PNG files, or under other
names, is Kodak, while some images of it are not.
"""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

KNOWN = {"Kodak": "24 images 981cbec69330d248"}  # what a published.json may name as its "dataset"


def image_digest(x: Tensor) -> str:
    """Digest of the pixels of x (3, H, W), uint8."""
    pixels = x.cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(f"{tuple(x.shape)}".encode() + pixels).hexdigest()[:16]


def set_digest(images: list[str]) -> str:
    """Number and digest of a set of images, given the digests of its images in any order."""
    together = hashlib.sha256("\n".join(sorted(images)).encode()).hexdigest()[:16]
    return f"{len(images)} images {together}"


def digest_of(curve: dict[str, Any]) -> str | None:
    """The set of images of a curve of ours; None if it does not state one set for all points."""
    stated = curve.get("meta", {}).get("images_digest")
    found = set(stated) if isinstance(stated, list) else {stated}
    return found.pop() if len(found) == 1 else None


def named(content: dict[str, Any]) -> str | None:
    """The images of a published.json: those that it states itself, or the set that it names.

    None if it states no "images_digest", and the name of its "dataset" is not in KNOWN.
    """
    name = str(content.get("dataset", "")).partition(",")[0].strip()
    return content.get("images_digest") or KNOWN.get(name)


def title(digest: str | None) -> str:
    """A set of images in words: "Kodak, 24 images" or "3 images"."""
    number = (digest or "unknown").split()[0]
    names = [name for name, known in KNOWN.items() if known == digest]
    return ", ".join([*names, f"{number} image{'s' * (number != '1')}"])


def why_not(published: list[dict[str, Any]], ours: dict[str, Any]) -> str:
    """A line on why the curves of a published.json must not stand beside `ours`; "" if they may."""
    if not published:
        return ""
    here, there = digest_of(ours), digest_of(published[0])
    if here == there is not None:
        return ""
    unknown = "" if there else " (it states no images_digest)"
    same_number = here and there and here.split()[0] == there.split()[0]
    return (f"Published curves are left out: they were measured on {published[0].get('dataset')}"
            f"{unknown}, but these results on {title(here)}"
            f"{' with other pixels' * bool(same_number)}.")
