"""Configuration and tensors of a model directory. Pickles are read only when asked for, and only for tensors."""

import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from kick import adapters
from kick.adapters import LowRank
from kick.checkpoint import GRIDS
from kick.errors import INCOMPLETE, ModelError, first_line
from kick.models import PICKLES
from kick.quantization import Grid, from_tensors

_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")  # what trainers leave beside them


@dataclass
class Foreign:
    """A model as its files give it. `tensors` by their names there; the rest by the names of linears.

    grids, stored_bits, adapters: see kick.measured.Structure.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    grids: dict[str, Grid] = field(default_factory=dict)
    stored_bits: dict[str, float] = field(default_factory=dict)
    code_bits: dict[str, int] = field(default_factory=dict)  # of every linear that came quantised
    adapters: dict[str, LowRank] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, globs: Iterable[str]) -> list[str]:
        """Remove the tensors that a glob matches; gives their names."""
        dropped = [name for name in self.tensors if any(fnmatchcase(name, glob) for glob in globs)]
        for name in dropped:
            del self.tensors[name]
        return dropped


def weight_files(path: Path, allow_pickle: bool) -> list[Path]:
    """The files that hold the weights in the directory `path`: those that its index names, `model.safetensors`, or what
    else there is. Raises ModelError if there are none that may be read.
    """
    found = _indexed(path, "*.safetensors.index.json") or _one_of(path, ["model.safetensors"], ["*.safetensors"])
    if found:
        return found
    pickles = _indexed(path, "*.bin.index.json") or _one_of(path, ["pytorch_model.bin"], PICKLES)
    if pickles and not allow_pickle:
        raise ModelError(
            f"{path} holds only pickles, such as {pickles[0].name}, which can run code when they are read.",
            "The parameter allow_pickle: true reads their tensors and refuses everything else in them.",
        )
    if not pickles:
        raise ModelError(f"{path} holds no weights.", "Expected *.safetensors.")
    return pickles


def _indexed(path: Path, glob: str) -> list[Path]:
    """The files named by the index in `path`, if there is one."""
    for index in sorted(path.glob(glob))[:1]:
        names = sorted(set(_json(index).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise ModelError(
                    f"{index} names '{name}', which is not there.",
                    INCOMPLETE,
                )
        return [path / name for name in names]
    return []


def _one_of(path: Path, names: Iterable[str], globs: Iterable[str]) -> list[Path]:
    found = [path / name for name in names if (path / name).is_file()]
    others = sorted(file for glob in globs for file in path.glob(glob) if not file.name.startswith(_NOT_WEIGHTS))
    return found or others


def configuration(path: Path) -> dict[str, Any]:
    """What config.json in the directory `path` holds, with how its weights are quantised."""
    config = _json(path / "config.json")
    separate = path / "quantize_config.json"  # AutoGPTQ keeps it beside the configuration
    if "quantization_config" not in config and separate.is_file():
        config["quantization_config"] = {"quant_method": "gptq", **_json(separate)}
    return config


def check_weights(path: Path, allow_pickle: bool) -> None:
    """Raise ModelError where the weights of the directory `path` cannot be read, as far as their headers tell."""
    for file in weight_files(path, allow_pickle):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass  # a file shorter than its header says does not open
            except (SafetensorError, OSError) as error:
                raise _damaged(file, error) from error


def read(path: Path, allow_pickle: bool) -> Foreign:
    """The model in the directory `path`."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path, allow_pickle):
        found = _safetensors(file) if file.suffix == ".safetensors" else _pickle(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise ModelError(f"'{twice[0]}' is in {file.name} and in another file of {path}.", "Remove the wrong one.")
        tensors |= found
    model = Foreign(path, configuration(path), tensors, adapters=adapters.load(path))
    if (path / GRIDS).is_file():  # a checkpoint of kick's own
        model.grids = from_tensors(load_file(path / GRIDS))
    return model


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", "A model directory holds a config.json.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object.", "A model directory holds a config.json.")
    return found


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ModelError:
    return ModelError(f"{file} cannot be read: {first_line(error)}", INCOMPLETE)


def _pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict: at the top, under `model`, or under `state` / `model` as composer writes."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{file} holds more than tensors, or is damaged: {reason}",
            "Whole pickled models are not read: load it with the code that wrote it and save it as safetensors.",
        ) from error
    for key in ("state", "model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"{file} is not a state dict of tensors.", "Save the model as safetensors.")
    return found
