"""Plain Hugging Face: the checkpoint without kick's own files, in the precision asked for."""

from pathlib import Path

from kick.checkpoint import Checkpoint
from kick.errors import CheckpointError
from kick.files import new_directory
from kick.models import load_model, load_tokenizer


def write(checkpoint: Checkpoint, out: Path, dtype: str) -> Path:
    """A directory that `from_pretrained` loads. dtype: one of torch's names, or auto for the checkpoint's own."""
    if dtype == "q8_0":
        raise CheckpointError("--dtype q8_0 with --format hf.", "It is one of GGUF's.")
    model = load_model(checkpoint.path, checkpoint.record["dtype"] if dtype == "auto" else dtype, "cpu")
    with new_directory(out) as partial:
        model.save_pretrained(partial)  # type: ignore[operator]
        load_tokenizer(checkpoint.path).save_pretrained(partial)
    return out
