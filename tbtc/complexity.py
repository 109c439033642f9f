"""Parameters and multiply-accumulates of the parts of the five models, by both counting rules.

The published GMACs (99 / 350 for Conv, 99 / 99 for SwinT) count a transposed convolution once per
output pixel, four times its work at stride 2, and do not count the products within attention.
"""

from __future__ import annotations

import functools

from common.complexity import complexity_of_parts

from tbtc.model import ZOO, build

SIZE = (512, 768)
PUBLISHED = {  # README of the PyTorch code, size M: parameters, GMACs of encoder, of decoder
    "zyc2022-conv-hyperprior": (21.4, 99, 350), "zyc2022-conv-charm": (29.1, 111, 361),
    "zyc2022-swint-hyperprior": (24.7, 99, 99), "zyc2022-swint-charm": (32.4, 110, 110)}


@functools.cache
def parts(model: str, quality: str = "M") -> dict[str, dict[str, float]]:
    """Parameters in millions, and GMACs, of g_a, h_a, h_s, g_s and the context model."""
    found = complexity_of_parts(build(model, quality), SIZE)
    names = {"h_mean_s": "h_s", "h_scale_s": "h_s"}
    result: dict[str, dict[str, float]] = {}
    for child, counts in found.items():
        if child in ("gaussian_conditional", "tanh"):
            continue
        name = names.get(child, child if child[:2] in ("g_", "h_", "en") else "context")
        part = result.setdefault(name, dict.fromkeys(
            ("params", "true", "output", "gdn", "products"), 0.0))
        part["params"] += counts["params_total"] / 1e6
        for key, count in (("true", "macs_true"), ("output", "macs_thop"), ("gdn", "macs_gdn"),
                           ("products", "macs_products")):
            part[key] += counts[count] / 1e9
    return result


def report(models: list[str], quality: str = "M") -> str:
    """A table of parts for each model, with totals and the published numbers."""
    lines = [f"{SIZE[1]}x{SIZE[0]}, size {quality}. work: GMACs of convolutions and linear layers; "
             "by output: with transposed convolutions charged by output pixels;",
             "GDN: its 1x1 convolutions; attention: q.k and weights.v", ""]
    for model in models:
        found = parts(model, quality)
        lines += [f"{model:26s} {'M params':>9s} {'work':>9s} {'by output':>9s} {'GDN':>9s} "
                  f"{'attention':>9s}"]
        for name, part in found.items():
            lines += [f"  {name:24s} " + " ".join(f"{part[key]:9.3f}" for key in (
                "params", "true", "output", "gdn", "products"))]
        total = sum(part["params"] for part in found.values())
        context = found.get("context", {}).get("true", 0)
        encoder = sum(found[k]["true"] + found[k]["gdn"] for k in ("g_a", "h_a")) + context
        work, output = (sum(found[k][key] + found[k]["gdn"] for k in ("g_s", "h_s")) + context
                        for key in ("true", "output"))
        lines += [f"  total {total:.1f} M parameters; encoder {encoder:.1f}, decoder {work:.1f} "
                  f"GMACs, by output pixels {output:.1f}"]
        if quality == "M" and model in ZOO:
            params, enc, dec = PUBLISHED[model]
            lines += [f"  published: {params} M, {enc} / {dec}"]
        lines += [""]
    return "\n".join(lines).rstrip()
