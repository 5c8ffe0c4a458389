"""Checkpoints in the formats of others: plain Hugging Face, packed GPTQ, GGUF."""

from collections.abc import Callable
from pathlib import Path

from kick import adapters, shapes
from kick.checkpoint import Checkpoint
from kick.errors import CheckpointError, unknown_name

FORMATS = ("hf", "gptq", "gguf")


def check_plain(checkpoint: Checkpoint, format: str) -> None:
    """Raise CheckpointError if there is something in `checkpoint` that `format` has no place for."""
    for part, what in ((adapters.WEIGHTS, "low-rank adapters"), (shapes.TABLE, "layers of different widths")):
        if (checkpoint.path / part).is_file():
            raise CheckpointError(f"{checkpoint.path} has {what}.", f"{format} has no place for them; --format hf has.")


def find_format(name: str) -> Callable[[Checkpoint, Path, str], Path]:
    """write(checkpoint, out, dtype) -> what was written. Raises UnknownNameError."""
    if name not in FORMATS:
        raise unknown_name("export format", name, FORMATS)
    from importlib import import_module

    return import_module(f"kick.export.{name}").write
