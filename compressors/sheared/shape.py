"""Target shapes: how many layers, hidden dimensions, heads and intermediate dimensions stay.

1.3B, 2.7B, 370M      the paper's, for LLaMA2-7B
24x384x1024x6         layers x hidden x intermediate x heads
like:PATH             those of another model: a directory or Hugging Face id
"""

import re
from dataclasses import asdict

from kick.errors import LevelError

from ..llama import ModelShape

PAPER = {"1.3B": (24, 2048, 5504, 16), "2.7B": (32, 2560, 6912, 20), "370M": (24, 1024, 2816, 8)}
_EXPECTED = f"Expected {', '.join(PAPER)}, layers x hidden x intermediate x heads (24x384x1024x6), or like:MODEL."


def parse_shape(text: str) -> tuple[int, int, int, int] | None:
    """(layers, hidden, intermediate, heads) as `text` says; None for like:MODEL. Raises LevelError for neither."""
    if text in PAPER:
        return PAPER[text]
    if match := re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", text):
        layers, hidden, intermediate, heads = map(int, match.groups())
        return layers, hidden, intermediate, heads
    if text.startswith("like:"):
        return None
    raise LevelError(f"no target shape '{text}'.", _EXPECTED)


def find_shape(text: str, source: ModelShape, keep_kv_heads: bool = False) -> ModelShape:
    """The target that `text` names, for a model of shape `source`. Raises LevelError if `source` cannot be cut to it.

    Heads go in groups, a key head with its query heads; with `keep_kv_heads`, from inside every group alike.
    """
    numbers = parse_shape(text)
    if numbers is None:
        other = find_shape_of(text)
        if other.head_dim != source.head_dim:
            raise LevelError(
                f"'{text}' has heads of {other.head_dim}, the model of {source.head_dim}.",
                "Whole heads are taken away: name a shape with heads of that size.",
            )
        numbers = (other.layers, other.hidden, other.intermediate, other.heads)
        expected = source.kv_heads if keep_kv_heads else other.heads // source.queries_per_key
        if other.kv_heads != expected:
            raise LevelError(
                f"'{text}' shares {other.kv_heads} key heads among {other.heads} query heads.",
                f"Cut from this model, {other.heads} query heads come with {expected}.",
            )
    layers, hidden, intermediate, heads = numbers
    kv_heads = source.kv_heads if keep_kv_heads else heads // source.queries_per_key
    target = ModelShape(layers, hidden, intermediate, heads, max(kv_heads, 1), source.head_dim)
    if heads % (source.kv_heads if keep_kv_heads else source.queries_per_key):
        each = f"each of {source.kv_heads} groups" if keep_kv_heads else f"groups of {source.queries_per_key}"
        raise LevelError(
            f"target '{text}': {heads} heads do not come out of {each}.",
            f"The model has {source.heads} query heads over {source.kv_heads} key heads.",
        )
    ours, theirs = asdict(source), asdict(target)
    for name, most in ours.items():
        if not 1 <= theirs[name] <= most:
            raise LevelError(
                f"target '{text}' asks for {theirs[name]} {name.replace('_', ' ')}; the model has {most}.",
                "A target is no larger than its source in anything.",
            )
    if hidden % heads:
        raise LevelError(
            f"target '{text}': {heads} heads do not divide the hidden size {hidden}.",
            "transformers refuses such a configuration.",
        )
    return target


def find_shape_of(text: str) -> ModelShape:
    """The shape of the model that `like:MODEL` names. Raises LevelError if it cannot be read."""
    from transformers import AutoConfig

    try:
        return ModelShape.of(AutoConfig.from_pretrained(text.removeprefix("like:"), trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise LevelError(f"'{text}': no configuration to be read there: {error}.", _EXPECTED) from error
