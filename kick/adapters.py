"""Low-rank adapters: what is added to a linear's output without touching its weight, y = W x + B (A x).

A sparse weight with an adapter cannot be merged without losing its zeros (SLoRB of AST), so the two are kept apart: in
memory the adapter is a hook on the linear, on disk it has the layout of the `peft` library, which loads it as well.

Shapes: down (A) [rank, in], up (B) [out, rank].
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kick.errors import INCOMPLETE, CheckpointError, ConfigError
from kick.files import read_json

FOLDER = "adapter"  # in a folder of its own: beside the weights, transformers would take the model for an adapter
WEIGHTS = f"{FOLDER}/adapter_model.safetensors"
_CONFIG = f"{FOLDER}/adapter_config.json"
_HELD = "_kick_adapter"  # what a linear's adapter is called in memory
_PREFIX = "base_model.model."  # how peft names the model inside its own


class LowRank(nn.Module):
    """y = W x + up (down x), with down [rank, in] and up [out, rank].

    Buffers, so that they go with their model to another device or precision; not among its tensors on disk.
    """

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def size(self) -> int:
        return self.down.numel() + self.up.numel()

    @property
    def bits(self) -> int:
        """Bits that it takes as stored."""
        return 8 * (self.down.numel() * self.down.itemsize + self.up.numel() * self.up.itemsize)

    def widened(self, out_features: int, in_features: int) -> "LowRank":
        """For a linear that was filled up with zeros at the end of its inputs and outputs."""
        pad = nn.functional.pad
        down = pad(self.down, (0, in_features - self.down.shape[1]))
        return LowRank(down, pad(self.up, (0, 0, 0, out_features - self.up.shape[0])))


def attach(model: nn.Module, adapters: dict[str, LowRank]) -> None:
    """From now on the linears of `model` that `adapters` names add them to their outputs."""
    for name, adapter in adapters.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(
                f"an adapter is for '{name}', which the model does not have.", "It belongs to another."
            ) from error
        if of(linear) is not None:
            raise CheckpointError(f"'{name}' has an adapter already.", "Merge it into the weights first.")
        weight = next(linear.parameters())
        device = None if weight.is_meta else weight.device  # a block that is on disk comes to where its adapters are
        setattr(linear, _HELD, adapter.to(device, weight.dtype))
        linear.register_forward_hook(_add)


def of(module: nn.Module) -> LowRank | None:
    """The adapter attached to `module`."""
    return getattr(module, _HELD, None)


def attached(model: nn.Module) -> dict[str, LowRank]:
    """All that are attached inside `model`, by the names of their linears."""
    return {name: adapter for name, module in model.named_modules() if (adapter := of(module)) is not None}


def refuse_attached(model: nn.Module, what: str) -> None:
    """Raise ConfigError for `what`, which cannot go with adapters, where a stage before it left some."""
    if attached(model):
        raise ConfigError(f"{what}, on a model that has adapters.", "Merge them, or put this stage before theirs.")


def _add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    inputs, adapter = args[0], of(module)  # where blocks run in another precision, the inputs have it
    assert adapter is not None
    return output + (inputs @ adapter.down.T.to(inputs)) @ adapter.up.T.to(inputs)


def save(directory: Path, model: nn.Module, adapters: dict[str, LowRank]) -> None:
    """Write `adapters` below `directory`, as peft would."""
    (directory / FOLDER).mkdir()
    tensors = {}
    for name, adapter in adapters.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = adapter.down.clone()  # linears may share theirs
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = adapter.up.clone()
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),  # the factor alpha / r is 1
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(model.get_submodule(name), Conv1D) for name in ranks),
    }
    (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(directory: Path) -> dict[str, LowRank]:
    """The adapters of the checkpoint in `directory`, by the names of their linears; none if it has none."""
    path = directory / WEIGHTS
    if not path.is_file():
        return {}
    try:
        config = read_json(directory / _CONFIG)
        stored = load_file(path)
        names = [key.removesuffix(".lora_A.weight") for key in stored if key.endswith(".lora_A.weight")]
        return {
            name.removeprefix(_PREFIX): LowRank(
                stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"] * _factor(config, name)
            )
            for name in names
        }
    except (KeyError, ValueError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}.", INCOMPLETE) from error


def _factor(config: dict[str, Any], name: str) -> float:
    plain = name.removeprefix(_PREFIX)
    rank = config.get("rank_pattern", {}).get(plain, config["r"])
    return config.get("alpha_pattern", {}).get(plain, config["lora_alpha"]) / rank
