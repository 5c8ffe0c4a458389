"""Language models behind lm-eval's LM interface, and the two questions that suites ask of them."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kick.errors import NotGivenError, unknown_name
from kick.lm.spec import LMSpec
from kick.spec import validated

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from torch import Tensor

LMS = {
    "fast": "kick.lm.fast:FastLM",
    "vllm": "kick.lm.vllm:VLLM",
    "server": "kick.lm.server:ServerLM",
}


def load_lm(spec: LMSpec, path: Path, dtype: str, device: str, setting: str = "dense") -> Any:
    """The model in directory `path`, the checkpoint of `setting`, behind the LM that `spec` names."""
    return find_lm(spec.name).from_checkpoint(path, params_of(spec), dtype=dtype, device=device, setting=setting)


def params_of(spec: LMSpec) -> Any:
    """The checked parameters of an LM. Raises ConfigError."""
    return validated(find_lm(spec.name).Params, spec.params, f"lm '{spec.name}'")


def find_lm(name: str) -> Any:
    if name not in LMS:
        raise unknown_name("lm", name, LMS, "`kick list lms` describes them.")
    module, _, attribute = LMS[name].partition(":")
    return getattr(import_module(module), attribute)


def loglikelihoods(lm: "LM", pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """For each (context, continuation): the continuation's natural-log likelihood, and whether it is the greedy one."""
    return lm.loglikelihood([_request("loglikelihood", pair) for pair in pairs], disable_tqdm=True)


def rolling_loglikelihoods(lm: "LM", texts: Sequence[str]) -> list[float]:
    """For each text: the natural-log likelihood of all its tokens, the first given the beginning-of-text token."""
    return lm.loglikelihood_rolling([_request("loglikelihood_rolling", (text,)) for text in texts], disable_tqdm=True)


def generate(
    lm: "LM",
    prompts: Sequence[str],
    until: Sequence[str],
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """For each prompt: the completion, which ends before any of the strings `until`. Greedy at temperature 0.

    min_new_tokens: an end-of-text token before that does not end it.
    """
    options: dict[str, Any] = {"until": list(until), "max_gen_toks": max_new_tokens}
    options |= {"do_sample": temperature > 0, "temperature": temperature}
    if temperature > 0:
        options["seed"] = seed
    if min_new_tokens:
        options["min_new_tokens"] = min_new_tokens
    requests = [_request("generate_until", (prompt, options)) for prompt in prompts]
    return lm.generate_until(requests, disable_tqdm=True)


def next_token_logprobs(lm: Any, text: str) -> "Tensor":
    """Log-probabilities [tokens, vocabulary] (float32) of the whole vocabulary at each token of `text`.

    Raises NotGivenError if this LM does not give them: servers and most engines show a few tokens only.
    """
    if not hasattr(lm, "next_token_logprobs"):
        raise NotGivenError(f"{type(lm).__name__} does not give whole distributions.", "Use the LM 'fast'.")
    return lm.next_token_logprobs(text)


def _request(kind: Any, arguments: tuple) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)
