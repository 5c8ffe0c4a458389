"""Checkpoints: the directory that a setting produces, its record `kick.json`, and the check that both still agree.

Plain `AutoModelForCausalLM.from_pretrained` loads the directory. `kick.json` is written last: a directory without it is
not a checkpoint.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kick import adapters, quantization, shapes
from kick.errors import CheckpointError
from kick.files import new_directory, read_json, sha256_of, write_json
from kick.levels import ANY_KNOB, Level, parse_level, parse_pattern
from kick.measured import Measured, Structure
from kick.quantization import Grid
from kick.settings import Setting
from kick.streaming import save_streamed, storage_of

RECORD = "kick.json"
GRIDS = "quantization/grids.safetensors"  # in a folder of its own: some loaders read every file beside the weights
TRAINING = "training"  # the folder with histories and figures of what was trained
HISTORY = "history.jsonl"  # in it: a line for each step
FORMAT = 1


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
        place = PurePosixPath(name)  # what lies there may be a link to elsewhere: its hash is the recorded one
        if place.is_absolute() or ".." in place.parts or {"bytes", "sha256"} - facts.keys():
            raise CheckpointError(f"{path / RECORD} names a file '{name}' that is not its own.", "Do not trust it.")
    for name, layer in record["layers"].items():
        if {"weights", "zeros", "transposed"} - layer.keys():
            raise KeyError(name)


def damage(checkpoint: Checkpoint) -> list[str]:
    """Files that are missing or of another size than recorded: what is seen without reading them."""
    problems = []
    for name, facts in checkpoint.record["files"].items():
        file = checkpoint.path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != facts["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, recorded {facts['bytes']}")
    return problems


def verify(checkpoint: Checkpoint) -> list[str]:
    """What no longer agrees with the record: files changed, missing or added, counts that differ. Empty if nothing."""
    record = checkpoint.record
    recorded = record["files"]
    changed = record["record_sha256"] != _record_sha256(record)
    problems = [f"{RECORD} has changed: its figures are not the recorded ones"] if changed else []
    problems += damage(checkpoint)
    for name, facts in recorded.items():
        file = checkpoint.path / name
        if file.is_file() and file.stat().st_size == facts["bytes"] and sha256_of(file) != facts["sha256"]:
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
