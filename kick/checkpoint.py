"""Checkpoints: the directory that a setting produces, its record `kick.json`, and the check that both still agree.

Plain `AutoModelForCausalLM.from_pretrained` loads the directory. `kick.json` is written last: a directory without it is
not a checkpoint.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kick import adapters, quantization, shapes
from kick.adapters import LowRank
from kick.blocks import Decoder, find_decoder
from kick.errors import CheckpointError
from kick.files import new_directory, read_json, sha256_of, write_json
from kick.levels import ANY_KNOB, Level, Pattern, parse_level, parse_pattern
from kick.quantization import Grid
from kick.settings import Setting
from kick.streaming import resident, save_streamed, storage_of

RECORD = "kick.json"
GRIDS = "quantization/grids.safetensors"  # in a folder of its own: some loaders read every file beside the weights
TRAINING = "training"  # the folder with histories and figures of what was trained
HISTORY = "history.jsonl"  # in it: a line for each step
FORMAT = 1
STRAY_ZEROS = 0.05  # share of a linear's weights; fewer zeros are no mask


@dataclass
class Structure:
    """What linears are asked or known to be, by name: counted against, and stored beside the weights.

    stored_bits: bits a weight takes in a format that no Grid describes, as the one who wrote it stored it.
    """

    patterns: dict[str, Pattern] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    stored_bits: dict[str, float] = field(default_factory=dict)
    adapters: dict[str, LowRank] = field(default_factory=dict)
    head: bool = False  # it is compressed too, and counted with the linears of the blocks

    def count(self, name: str, weight: Tensor) -> dict[str, Any]:
        """What `count_weight` finds for the linear called `name`."""
        return count_weight(
            weight,
            self.patterns.get(name),
            self.grids.get(name),
            self.stored_bits.get(name),
            self.adapters.get(name),
        )


@dataclass
class Measured:
    """What was counted on the weights of a model, whatever was asked for.

    `layers`: for each linear its shape [out, in], weights, zeros, sparsity and bits_per_weight; under a pattern also
    pattern_violations, groups of M neighbours that keep more than N; if quantised also bits and grid_violations,
    weights that are not on their grid; with an adapter also its rank and parameters, which count as bits of the weight.
    """

    layers: dict[str, dict[str, Any]]
    uncovered: list[str]
    uncovered_weights: int  # inside the blocks, in no linear: the experts of a mixture, say
    uncovered_bits: int  # as stored
    coverage: float
    parameters: int
    broken: list[str]  # tensors that hold values that are not finite

    @property
    def sparsity(self) -> float:
        """Share of zeros over all linears inside the blocks, and over the head if it is compressed."""
        return self._zeros / self._weights if self._weights else 0.0

    @property
    def sparsity_of_blocks(self) -> float:
        """The same over all weights of the blocks: what no compressor reached counts as dense."""
        weights = self._weights + self.uncovered_weights
        return self._zeros / weights if weights else 0.0

    @property
    def _weights(self) -> int:
        return sum(layer["weights"] for layer in self.layers.values())

    @property
    def _zeros(self) -> int:
        return sum(layer["zeros"] for layer in self.layers.values())

    @property
    def violations(self) -> int:
        return sum(layer.get("pattern_violations", 0) for layer in self.layers.values())

    @property
    def grid_violations(self) -> int:
        return sum(layer.get("grid_violations", 0) for layer in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """Mean over all weights of the blocks: packed where they are quantised, as stored where they are not."""
        bits = sum(layer["weights"] * layer["bits_per_weight"] for layer in self.layers.values()) + self.uncovered_bits
        return bits / (self._weights + self.uncovered_weights)


def measure(model: nn.Module, decoder: Decoder | None = None, structure: Structure | None = None) -> Measured:
    """Count zeros, coverage and violations over the linears of `model`'s blocks."""
    decoder = decoder or find_decoder(model)
    structure = structure or Structure()
    layers = {}
    parameters = dict(model.named_parameters())
    inside = {f"{block.name}.{name}" for block in decoder.blocks for name, _ in block.module.named_parameters()}
    broken = [name for name in parameters.keys() - inside if not bool(parameters[name].isfinite().all())]
    for block in decoder.blocks:
        with resident(block.module):
            for linear in block.linears:
                counted = structure.count(linear.name, linear.weight)
                layers[linear.name] = {**counted, "transposed": linear.transposed}
            broken += [
                f"{block.name}.{name}"
                for name, weight in block.module.named_parameters()
                if not bool(weight.isfinite().all())
            ]
    covered = sum(layer["weights"] for layer in layers.values())
    if structure.head and decoder.head is not None:
        head = decoder.head
        layers[head.name] = {**structure.count(head.name, head.weight), "transposed": head.transposed}
    outside = [parameters[name] for name in decoder.uncovered]
    missed = sum(weight.numel() for weight in outside)
    return Measured(
        layers=layers,
        uncovered=list(decoder.uncovered),
        uncovered_weights=missed,
        uncovered_bits=sum(8 * weight.numel() * weight.itemsize for weight in outside),
        coverage=covered / (covered + missed) if covered else 0.0,
        parameters=sum(parameter.numel() for parameter in parameters.values())
        + sum(adapter.size for adapter in structure.adapters.values()),
        broken=sorted(broken),
    )


def count_weight(
    weight: Tensor,
    pattern: Pattern | None = None,
    grid: Grid | None = None,
    stored_bits: float | None = None,
    adapter: LowRank | None = None,
) -> dict[str, Any]:
    """Shape, weights, zeros, sparsity and bits of one weight [out, in]; violations of a pattern and of a grid."""
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    counted: dict[str, Any] = {
        "shape": list(weight.shape),
        "weights": weight.numel(),
        "zeros": zeros,
        "sparsity": zeros / weight.numel(),
        "bits_per_weight": 8 * weight.dtype.itemsize,  # dense storage: a zero takes the room of any other weight
    }
    if pattern is not None:
        counted |= {"pattern": str(pattern), "pattern_violations": pattern_violations(weight, pattern)}
    if grid is not None:
        counted |= {"bits": grid.bits, "grid_violations": grid.violations(weight)}
        if not counted["grid_violations"]:  # else it cannot be packed
            counted["bits_per_weight"] = grid.storage_bits(weight.shape[1])
    elif stored_bits is not None:
        counted |= {"stored_bits": stored_bits, "bits_per_weight": stored_bits}
    if adapter is not None:
        counted |= {"adapter_rank": adapter.rank, "adapter_parameters": adapter.size}
        counted["bits_per_weight"] += adapter.bits / weight.numel()
    return counted


def pattern_violations(weight: Tensor, pattern: Pattern) -> int:
    """How many groups of M neighbours along `in` hold more than N non-zeros."""
    groups = weight.reshape(weight.shape[0], -1, pattern.of)
    return int(((groups != 0).sum(dim=-1) > pattern.keep).sum())


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk and its record."""

    path: Path
    record: dict[str, Any] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Identity of the weights: the beginnings of the safetensors files' SHA-256, in order."""
        return self.record["weights_fingerprint"]


def save(
    path: Path,
    model: Any,
    tokenizer: Any,
    record: dict[str, Any],
    measured: Measured,
    structure: Structure,
    attachments: Mapping[str, Path] | None = None,
) -> Checkpoint:
    """Write model, tokenizer, grids, adapters and record to `path`; it appears there only when all of it is on disk.

    attachments: other files to copy there, by their place in it.

    Quantised weights are stored dense, so that everything loads them; the grids are what `kick export` packs them by.
    """
    record = {
        "format": FORMAT,
        **record,
        "parameters": measured.parameters,
        "sparsity": measured.sparsity_of_blocks,
        "bits_per_weight": measured.bits_per_weight,
        "pattern_violations": measured.violations,
        "grid_violations": measured.grid_violations,
        "coverage": {"share": measured.coverage, "uncovered": measured.uncovered},
        "layers": {name: {**record["layers"].get(name, {}), **counted} for name, counted in measured.layers.items()},
    }
    with new_directory(path) as partial:
        if storage_of(model) is not None:
            save_streamed(model, partial)
        else:
            model.save_pretrained(partial)
            if table := shapes.table_of(model):
                shapes.save_table(partial, table)
        tokenizer.save_pretrained(partial)
        if structure.grids:
            (partial / GRIDS).parent.mkdir()
            save_file(quantization.to_tensors(structure.grids), partial / GRIDS)
        if structure.adapters:
            adapters.save(partial, model, structure.adapters)
        for name, file in (attachments or {}).items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, partial / name)
        record["files"] = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": sha256_of(partial / name)}
            for name in _files_in(partial)
        }
        weight_files = {
            name: facts for name, facts in record["files"].items() if name.endswith(".safetensors") and name != GRIDS
        }
        record["bytes"] = sum(facts["bytes"] for facts in weight_files.values())
        record["weights_fingerprint"] = "-".join(facts["sha256"][:32] for facts in weight_files.values())
        record["record_sha256"] = _record_sha256(record)
        write_json(partial / RECORD, record)
    return Checkpoint(path, record)


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path` as its record describes it; `verify` checks that this is still true."""
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}.", "Expected a directory that `kick compress` wrote.")
    if not (path / RECORD).is_file():
        raise CheckpointError(f"{path} holds no {RECORD}.", "Expected a directory that `kick compress` wrote.")
    try:
        record = read_json(path / RECORD)
        _check_record(path, record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / RECORD} cannot be read: {error!r}.", "Compress again.") from error
    return Checkpoint(path, record)


def _check_record(path: Path, record: dict[str, Any]) -> None:
    """A record may come from anywhere: it must have our form, and name files inside its own directory only."""
    if record["format"] != FORMAT:
        raise CheckpointError(
            f"{path / RECORD} has format {record['format']}; this kick reads {FORMAT}.", "Compress again."
        )
    for stage in Setting(**record["setting"]).stages:
        level_of(stage.level)
    needed = {"setting_name", "source", "sparsity", "bytes", "bits_per_weight", "weights_fingerprint", "warnings"}
    needed |= {"coverage", "calibration", "parameters", "seconds", "peak_memory_bytes", "dtype", "record_sha256"}
    if missing := needed - record.keys():
        raise KeyError(*sorted(missing))
    for name, facts in record["files"].items():
        if not (path / name).resolve().is_relative_to(path.resolve()) or {"bytes", "sha256"} - facts.keys():
            raise CheckpointError(f"{path / RECORD} names a file '{name}' that is not its own.", "Do not trust it.")
    for name, layer in record["layers"].items():
        if {"weights", "zeros", "transposed"} - layer.keys():
            raise KeyError(name)


def verify(checkpoint: Checkpoint) -> list[str]:
    """What no longer agrees with the record: files changed, missing or added, counts that differ. Empty if nothing."""
    problems = []
    record = checkpoint.record
    recorded = record["files"]
    if record["record_sha256"] != _record_sha256(record):
        problems.append(f"{RECORD} has changed: its figures are not the recorded ones")
    for name, facts in recorded.items():
        file = checkpoint.path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != facts["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, recorded {facts['bytes']}")
        elif sha256_of(file) != facts["sha256"]:
            problems.append(f"{name} has changed: its SHA-256 is not the recorded one")
    added = set(_files_in(checkpoint.path)) - recorded.keys() - {RECORD}
    problems += [f"{name} was added" for name in sorted(added)]
    if problems:
        return problems
    structure = Structure(
        grids=read_grids(checkpoint),
        adapters=adapters.load(checkpoint.path),
        stored_bits={k: layer["stored_bits"] for k, layer in record["layers"].items() if "stored_bits" in layer},
    )
    for name, layer in record["layers"].items():
        if "pattern" in layer:
            structure.patterns[name] = parse_pattern(layer["pattern"])
    found = set()
    for name, weight in _weights(checkpoint):
        found.add(name)
        expected = record["layers"][name]
        counted = structure.count(name, weight)
        problems += [
            f"{name}: {key} is {counted[key]}, recorded {expected[key]}"
            for key in counted
            if counted[key] != expected.get(key)
        ]
    return problems + [f"{name} is recorded but in no file" for name in sorted(record["layers"].keys() - found)]


def _record_sha256(record: dict[str, Any]) -> str:
    """Hash of everything else in the record, so that a changed figure is noticed like a changed weight."""
    rest = {key: value for key, value in record.items() if key != "record_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _files_in(directory: Path) -> list[str]:
    """Names of all files below `directory`, relative to it."""
    return sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())


def read_grids(checkpoint: Checkpoint) -> dict[str, Grid]:
    """The grids of the quantised linears, by name."""
    path = checkpoint.path / GRIDS
    try:
        return quantization.from_tensors(load_file(path)) if path.is_file() else {}
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}.", "Compress again.") from error


def level_of(text: str) -> Level | None:
    """The level that a stored setting names, whichever compressor took it."""
    return parse_level(text, ANY_KNOB) if text else None


def _weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Each recorded linear's weight [out, in], one at a time, straight from the files."""
    from safetensors import safe_open

    layers = checkpoint.record["layers"]
    for file in sorted(checkpoint.path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                name = key.removesuffix(".weight")
                if name in layers and key != name:
                    weight = tensors.get_tensor(key)
                    yield name, weight.T if layers[name]["transposed"] else weight
