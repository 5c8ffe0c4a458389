"""Checkpoints in the formats of others: plain Hugging Face, packed GPTQ, GGUF."""

from collections.abc import Callable
from pathlib import Path

from kick.checkpoint import Checkpoint
from kick.errors import unknown_name

FORMATS = ("hf", "gptq", "gguf")


def find_format(name: str) -> Callable[[Checkpoint, Path, str], Path]:
    """write(checkpoint, out, dtype) -> what was written. Raises UnknownNameError."""
    if name not in FORMATS:
        raise unknown_name("export format", name, FORMATS)
    from importlib import import_module

    return import_module(f"kick.export.{name}").write
