"""The revisions of the source as options of one model, and how they are recognised in weights."""

from __future__ import annotations

from typing import Any

from common import UserError

from torch import Tensor

BASELINE: dict[str, Any] = {
    "depths": (2, 4, 6, 2, 2, 2), "kernel_size": 7, "mlp_ratio": 4, "dw_groups": 0,
    "block_norm": "layernorm", "decoder_dw": "conv", "drop_path_rate": 0.0,
    "layer_scale_init": 1e-6, "stem": "patch4", "resample": "k2s2", "resample_norm": "none",
    "context": "mcm", "variable_rate": False, "lambda_input": "log",
    "external_attention": False}
STRIDE2 = BASELINE | {"stem": "k5s2", "resample": "k3s2", "drop_path_rate": 0.1}
VARIANTS = {  # revisions of the source, oldest first
    "v0_ln": BASELINE | {"resample_norm": "layernorm"},
    "v1_patch": BASELINE,
    "v2_stride2": STRIDE2,
    "v3_scctx": STRIDE2 | {"context": "scctx"},
    "v4_ea": STRIDE2 | {"context": "scctx", "external_attention": True},
    "v5_vr": STRIDE2 | {"context": "scctx", "variable_rate": True},
}
CHOICES = {
    "block_norm": ("layernorm", "gdn", "batchnorm", "none"),
    "decoder_dw": ("conv", "convtranspose"),
    "stem": ("patch4", "k2s2", "k5s2"), "resample": ("k2s2", "k3s2"),
    "resample_norm": ("none", "layernorm"), "context": ("mcm", "scctx"),
    "lambda_input": ("log", "raw")}


def merged(variant: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a variant, with some replaced; UserError for unknown names and values."""
    if variant not in VARIANTS:
        raise UserError(f"variant {variant}: choose from {', '.join(VARIANTS)}")
    result = dict(VARIANTS[variant])
    for key, value in options.items():
        if key not in result:
            raise UserError(f"there is no option {key}: {', '.join(result)}")
        if value is None:
            continue
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{key} {value}: choose from {', '.join(CHOICES[key])}")
        result[key] = tuple(value) if isinstance(value, list) else value
    if len(result["depths"]) != 6 or min(result["depths"]) < 1:
        raise UserError(f"depths {result['depths']}: give six positive numbers")
    kernels = kernels_of(result["kernel_size"])
    if len(kernels) != 2 or any(k % 2 == 0 for k in kernels):
        raise UserError(f"kernel_size {result['kernel_size']}: give an odd number, or two")
    result["kernel_size"] = kernels if kernels[0] != kernels[1] else kernels[0]
    if not 0 <= result["drop_path_rate"] < 1:
        raise UserError(f"drop_path_rate {result['drop_path_rate']}: give 0 or more, below 1")
    return result


def kernels_of(kernel_size: int | tuple[int, ...]) -> tuple[int, ...]:
    """Kernel sizes in the blocks of (g_a and g_s, h_a and h_s)."""
    sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,)
    return sizes if len(sizes) > 1 else 2 * sizes


def options_of(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The options that names and shapes of weights reveal.

    They do not reveal `decoder_dw` of depthwise kernels (assumed to be "conv"), `lambda_input`
    ("log"), and options that only affect training.
    """
    def kernel(stage: str) -> int:
        return next(t.shape[2] for key, t in state_dict.items()
                    if key.startswith(f"{stage}.down.") and t.dim() == 4)

    block = "g_a.1.blocks.0"
    depths = [len({key.split(".")[3] for key in state_dict if key.startswith(f"{stage}.blocks.")})
              for stage in ("g_a.0", "g_a.1", "g_a.2", "g_a.3", "h_a.0", "h_a.1")]
    norms = {f"{block}.norm.beta": "gdn", f"{block}.norm.running_mean": "batchnorm",
             f"{block}.norm.weight": "layernorm"}
    N, inputs, size, _ = state_dict[f"{block}.dwconv.weight"].shape
    hyper = state_dict["h_a.1.blocks.0.dwconv.weight"].shape[2]
    return {
        "depths": tuple(depths), "kernel_size": size if size == hyper else (size, hyper),
        "mlp_ratio": len(state_dict[f"{block}.mlp.0.weight"]) // N,
        "dw_groups": 0 if inputs == 1 else N // inputs,
        "block_norm": next((norm for key, norm in norms.items() if key in state_dict), "none"),
        "stem": {4: "patch4", 2: "k2s2", 5: "k5s2"}[kernel("g_a.0")],
        "resample": {2: "k2s2", 3: "k3s2"}[kernel("g_a.1")],
        "resample_norm": "layernorm" if "g_a.1.down.1.weight" in state_dict else "none",
        "context": "mcm" if "context_model.contexts.0.weight" in state_dict else "scctx",
        "variable_rate": "scale_a.0.layers.0.weight" in state_dict,
        "external_attention": "g_a.1.attention.conv1.weight" in state_dict}
