"""Plain Hugging Face: the checkpoint without kick's own files, in the precision asked for."""

from pathlib import Path
from typing import Any

from kick import adapters, shapes
from kick.checkpoint import Checkpoint
from kick.errors import CheckpointError
from kick.files import new_directory
from kick.loading import load_model, load_tokenizer


def write(checkpoint: Checkpoint, out: Path, dtype: str) -> Path:
    """A directory that `from_pretrained` loads. dtype: one of torch's names, or auto for the checkpoint's own.

    Narrow layers are filled up with zeros; adapters stay apart, in `adapter/`, as peft loads them.
    """
    if dtype == "q8_0":
        raise CheckpointError("--dtype q8_0 goes with --format gguf only.", "Give another --dtype, or none.")
    model: Any = load_model(checkpoint.path, checkpoint.record["dtype"] if dtype == "auto" else dtype, "cpu")
    added = adapters.attached(model)
    if shapes.read_table(checkpoint.path):
        model = shapes.padded(model)
        added = {name: own.widened(*model.get_submodule(name).weight.shape) for name, own in added.items()}
    with new_directory(out) as partial:
        model.save_pretrained(partial)
        if added:
            adapters.save(partial, model, added)
        load_tokenizer(checkpoint.path).save_pretrained(partial)
    return out
