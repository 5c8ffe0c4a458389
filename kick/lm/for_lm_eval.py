"""kick's `fast` LM in stock lm-eval, as the model `kick`.

    python -m kick.lm.for_lm_eval run --model kick --model_args pretrained=MODEL,dtype=bfloat16 --tasks arc_easy

lm-eval finds no models of other packages by itself: this module registers one, and run as a program it is lm-eval's own
command line. In Python, importing it is enough for `lm_eval.simple_evaluate(model="kick", model_args=...)`.
"""

import os
from typing import Any

from jinja2 import TemplateError
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from kick import devices, loading, models
from kick.errors import ConfigError
from kick.lm.fast import FastLM


@register_model("kick")
class Kick(FastLM):
    """`pretrained` is any model source of kick: a directory, a hub id, a .gguf file, a packaged model, a checkpoint.

    Batches are made by tokens, so lm-eval's `batch_size` changes nothing. max_length: of the context, for windows as
    others have them.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        device: str | None = None,
        row_tokens: int | None = None,
        max_length: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **other: Any,
    ) -> None:
        if other := {name: value for name, value in other.items() if value not in (None, False)}:
            raise ConfigError(
                f"--model kick takes no '{min(other)}'.",
                "It takes pretrained, dtype, device, row_tokens and max_length, and runs no code of a model.",
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "--model kick in several processes, each of which would answer everything.",
                "Start it without accelerate or torchrun; a sweep uses several devices (docs/clusters.md).",
            )
        device, dtype = devices.choose(device or "auto", dtype)
        path = models.fetch(models.find_source(pretrained))
        params = FastLM.Params(row_tokens=row_tokens)
        super().__init__(loading.load_model(path, dtype, device), loading.load_tokenizer(path), path, params)
        self._max_length = min(self._max_length, max_length or self._max_length)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As lm-eval's own models do it: where a template refuses a system's turn, without that turn."""
        try:
            return super().apply_chat_template(chat_history, add_generation_prompt)
        except TemplateError:
            rest = [turn for turn in chat_history if turn["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            return super().apply_chat_template(rest, add_generation_prompt)


if __name__ == "__main__":
    cli_evaluate()
