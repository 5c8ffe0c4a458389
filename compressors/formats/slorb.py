"""AST's sparse low-rank boosting: y = (W * mask) x + S (X x), arXiv 2407.20584, equations 9 to 11.

S is stored as SLoRB_Weight (or SLoRA_Weight) [out, in / k], X as x_proj [in / k, in]: exactly a low-rank adapter.
Where X is not stored it is the paper's: ones on blocks of k neighbours.
"""

import torch
from torch import Tensor

from kick.adapters import LowRank
from kick.errors import INCOMPLETE, ModelError

from .files import Foreign

_NAMES = ("SLoRB_Weight", "SLoRA_Weight")


def take_adapters(model: Foreign) -> bool:
    """Move the low-rank branches of `model` into its adapters; whether there were any."""
    for key in [key for key in model.tensors if key.endswith(tuple(f".{name}" for name in _NAMES))]:
        name = key.rpartition(".")[0]
        up = model.tensors.pop(key)
        down = model.tensors.pop(f"{name}.x_proj", None)
        weight = model.tensors.get(f"{name}.weight")
        if weight is None:
            raise ModelError(
                f"{model.path} holds '{key}' and no weight beside it.",
                INCOMPLETE,
            )
        shape = tuple(weight.shape)
        if up.shape[0] != shape[0]:  # GPT-2's Conv1D stores [in, out]
            shape = shape[::-1]
        if down is None:
            down = block_ones(up.shape[1], shape[1], name)
        if down.shape != (up.shape[1], shape[1]) or up.shape[0] != shape[0]:
            raise ModelError(
                f"'{key}' is {list(up.shape)} and its x_proj {list(down.shape)}, for a weight {list(weight.shape)}.",
                "Expected [out, in / k] and [in / k, in].",
            )
        model.adapters[name] = LowRank(down.clone(), up.clone())  # one X may serve many linears
    model.drop(["*.x_proj"])  # of linears whose branch was left out
    return bool(model.adapters)


def block_ones(rank: int, in_features: int, name: str = "x_proj") -> Tensor:
    """X of the paper: [rank, in], ones where input j belongs to block j // k, with k = in / rank."""
    if in_features % rank:
        raise ModelError(f"{name}: {rank} blocks do not divide {in_features} inputs.", "x_proj must be stored then.")
    return torch.eye(rank).repeat_interleave(in_features // rank, dim=1)
