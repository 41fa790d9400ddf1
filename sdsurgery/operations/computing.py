"""What the operations share that compute weights: what computes, and what no longer holds of the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..checkpoint import Change, Checkpoint, Tensor
from ..errors import UnsupportedError
from ..models.identify import Model

if TYPE_CHECKING:
    from ..merging.torch_engine import TorchEngine

ComputeName = Literal["fp32", "fp64"]
DeviceName = Literal["cpu", "cuda"]


def engine(operation: str, compute: ComputeName, device: DeviceName) -> TorchEngine:
    """What computes.

    Raises:
        UnsupportedError: If torch is missing, or finds no GPU where one is asked for.
    """
    try:
        from ..merging.torch_engine import TorchEngine
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"{operation} needs {error.name}", remedy="pip install 'sdsurgery[torch]'") from error
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UnsupportedError("torch finds no GPU to compute on", remedy="leave --device out")
    return TorchEngine(compute, device)


def without_averages(
    checkpoint: Checkpoint, model: Model, reason: str = "averaged weights of the first model alone"
) -> tuple[dict[str, Tensor], list[Change]]:
    """The tensors but for the model's averaged weights, which aren't those of the result."""
    averages = set(model.components["ema"].all_keys()) if "ema" in model.components else set()
    kept = {key: tensor for key, tensor in checkpoint.items() if key not in averages}
    return kept, [Change(key, "dropped", f"{checkpoint[key]}: {reason}") for key in checkpoint if key in averages]
