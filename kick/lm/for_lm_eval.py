"""kick's `fast` LM in stock lm-eval, as the model `kick`.

    python -m kick.lm.for_lm_eval run --model kick --model_args pretrained=MODEL,dtype=bfloat16 --tasks arc_easy

lm-eval finds no models of other packages by itself: this module registers one, and run as a program it is lm-eval's own
command line. In Python, importing it is enough for `lm_eval.simple_evaluate(model="kick", model_args=...)`.
"""

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from kick import devices, loading, models
from kick.lm.fast import FastLM


@register_model("kick")
class Kick(FastLM):
    """`pretrained` is any model source of kick: a directory, a hub id, a .gguf file, a packaged model, a checkpoint.

    Batches are made by tokens, so lm-eval's `batch_size` changes nothing.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        device: str | None = None,
        row_tokens: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        device, dtype = devices.choose(device or "auto", dtype)
        path = models.fetch(models.find_source(pretrained))
        params = FastLM.Params(row_tokens=row_tokens)
        super().__init__(loading.load_model(path, dtype, device), loading.load_tokenizer(path), path, params)


if __name__ == "__main__":
    cli_evaluate()
