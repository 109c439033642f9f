"""The interface that common/ requires of a paper's model, and of a layer with an exact form.

The model of a paper derives from `Codec`. It declares everything that coding, training and
evaluation read from a model, with defaults where these make sense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypedDict, runtime_checkable

from common.coding.entropy import EntropyBottleneck
from common.coding.names import plain_names

import torch
from compressai.entropy_models import EntropyModel, GaussianConditional
from compressai.models import CompressionModel
from torch import Tensor, nn

TABLES = ("_quantized_cdf", "_offset", "_cdf_length")  # of an EntropyModel
Layers = nn.Module | Sequence[nn.Module]  # one layer, or several in their order
Run = Callable[[Layers, Tensor], Tensor]  # layers, x -> layers(x): `in_floats`, or `exact.run`


def in_floats(layers: Layers, x: Tensor) -> Tensor:
    """Apply layers in the ordinary way, where a method takes a `Run`."""
    for layer in layers if isinstance(layers, (Sequence, nn.ModuleList)) else [layers]:
        x = layer(x)
    return x


class _Strings(TypedDict):
    strings: list[list[bytes]]
    shape: tuple[int, int]


class Coded(_Strings, total=False):
    """Result of `compress` in CompressAI's form, with the bytes that the decoder needs in addition.

    strings: for each latent, one string per image; shape: height and width of the last latent;
    parameters: such as the rate index.
    """

    parameters: bytes


@dataclass(frozen=True)
class Provenance:
    """Origin of the weights: configuration, progress and hardware of the training."""

    config: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    epoch: int | None = None
    hardware: str | None = None

    @property
    def total_steps(self) -> int | None:
        """All steps that led to the weights, those of the runs that it started from included."""
        before = self.config.get("steps_before") or 0
        return None if self.step is None else self.step + before


@dataclass(frozen=True)
class RateRange:
    """The operating points of a variable-rate model: all values of one argument of `compress`.

    name: that argument, such as "lmbda"; low, high: the values that the weights are trained for.
    The rate increases with the value.
    """

    name: str
    low: float
    high: float

    def at(self, position: float) -> float:
        """The value at a position from 0 (low) to 1 (high) on a logarithmic scale, in float32."""
        value = self.low * (self.high / self.low) ** position
        return float(torch.tensor(value, dtype=torch.float32))


class Codec(CompressionModel):
    """A codec that can be trained, and whose files can be decoded on every machine.

    A model adds g_a, g_s and the other parts of its paper. `forward` maps images (B, 3, H, W),
    whose sides are multiples of `downsampling_factor`, to {"x_hat", "likelihoods"}.

    A model that predicts means must compute them and the scales exactly in eval mode, as `compress`
    does: the latents depend on the means, and otherwise the estimated rate would not be that of the
    file. Scales alone may be in floating point there.
    """

    tag: ClassVar[bytes]  # four bytes in the header of the paper's files
    options: ClassVar[tuple[str, ...]] = ()  # constructor arguments that weights do not reveal
    exact_parts: tuple[str, ...] = ()  # modules that the decoder computes exactly
    downsampling_factor: int = 64  # image pixels per position of the last latent
    coding_device: torch.device | None = None  # runs exact_parts; None: the device of the model
    provenance: Provenance = Provenance()
    N: int  # hidden channels
    M: int  # latent channels

    # The parts that most papers share; each model sets those that it has.
    g_a: nn.Module
    g_s: nn.Module
    h_a: nn.Module
    h_s: nn.Module
    entropy_bottleneck: EntropyBottleneck
    gaussian_conditional: GaussianConditional

    # With *args, a type checker accepts models that name their arguments instead.
    def compress(self, x: Tensor, *args: Any, **rate: Any) -> Coded:
        """Code x, as in `forward`; rate: the operating point of a variable-rate model."""
        raise NotImplementedError

    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int], *args: Any,
                   **rate: Any) -> dict[str, Tensor]:
        """Decode the result of `compress` to {"x_hat": (B, 3, H, W) in [0, 1]}."""
        raise NotImplementedError

    def read_parameters(self, parameters: bytes) -> dict[str, Any]:
        """Return the `rate` arguments of `decompress` from the parameters of `compress`."""
        return {}

    def rate_range(self) -> RateRange | None:
        """The operating points of a variable-rate model; None if it has one rate."""
        return None

    def coding_steps(self, shape: tuple[int, int, int]) -> tuple[str, Tensor]:
        """What the steps are called in which y of the shape (M, h, w) is coded, and the number of
        the step, from 0 on, of each latent: int64, (M, h, w).
        """
        return "pass", torch.zeros(shape, dtype=torch.int64)

    def scale_outputs(self) -> list[Tensor]:
        """The weights and biases, or views of them, in which all predicted scales are linear, so
        that multiplying them by a factor multiplies the scales; [] if there are none.
        """
        return []

    def load_state_dict(  # type: ignore[override]  # as CompressAI's, it has no `assign`
            self, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
        """Load weights by any of their names (`names.plain_name`).

        CDF tables of which the weights have nothing are left as they are; they are not weights.
        """
        state_dict = plain_names(state_dict)
        for name, module in self.named_modules():
            if isinstance(module, EntropyModel):
                own = {f"{name}.{table}": getattr(module, table) for table in TABLES}
                if not any(key in state_dict for key in own):
                    state_dict |= own
            if isinstance(module, GaussianConditional):
                state_dict.setdefault(f"{name}.scale_table", module.scale_table)
        return super().load_state_dict(state_dict, strict)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor], *args: Any, **options: Any) -> Codec:
        """Build the model with the sizes of the weights and load them strictly.

        Raises KeyError or RuntimeError if the weights belong to another model.
        """
        raise NotImplementedError


@runtime_checkable
class ExactModule(Protocol):
    """A module whose exact form is not just that of its layers in sequence."""

    def exact(self, x: Tensor, run: Run) -> Tensor:
        """`forward` in fixed-point arithmetic: `run` computes the layers, and all other operations
        are elementwise and exact in float64.
        """
        ...


@runtime_checkable
class MultipliesActivations(Protocol):
    """A module that multiplies activations with each other, as attention does."""

    def product_macs(self, x: Tensor) -> int:
        """Multiply-accumulates of these products for the input x."""
        ...
