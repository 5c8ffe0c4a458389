"""Short answers that a model writes: asked in one go; free ones scored by exact match, containment and token F1."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kick.errors import DataError
from kick.lm import generate
from kick.suite import Example, Metric, Sample

from . import scoring
from .prompts import Prompt

INSTRUCTION = "Answer the question with a name or a few words.\n\n"
METRICS: tuple[Metric, ...] = (
    Metric("contains", value="contains", unit="share of questions"),
    Metric("exact_match", value="exact_match", unit="share of questions"),
    Metric("f1", value="f1"),
)


def draw_shots(rows: Sequence[dict[str, Any]], count: int, seed: int) -> list[list[str]]:
    """[question, answer] pairs: the same for all questions, so that their prompts begin alike. Raises DataError."""
    if len(rows) < count:
        raise DataError(
            f"{count} shots asked for; there are {len(rows)} questions to draw them from.", "Ask for fewer."
        )
    chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    return [[rows[index]["question"], rows[index]["answers"][0]] for index in chosen]


def answer_freely(
    lm: Any,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    chat: bool,
    max_new_tokens: int,
    rule: scoring.Rule = "triviaqa",
) -> Iterator[Sample]:
    """One sample for each example, scored against its content's `answers`."""

    def score(example: Example, output: str) -> dict[str, float]:
        answers = example.content["answers"]
        return {
            "contains": scoring.contains(output, answers, rule),
            "exact_match": scoring.exact_match(output, answers, rule),
            "f1": scoring.token_f1(output, answers, rule),
        }

    return written_answers(lm, examples, prompts, chat, max_new_tokens, score)


def written_answers(
    lm: Any,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    chat: bool,
    max_new_tokens: int,
    score: Callable[[Example, str], dict[str, float]],
) -> Iterator[Sample]:
    """One sample for each example, with what `score` makes of the answer. Without a chat an answer is one line."""
    outputs = generate(lm, [prompt.text for prompt in prompts], [] if chat else ["\n"], max_new_tokens)
    for example, prompt, output in zip(examples, prompts, outputs, strict=True):
        yield Sample(
            id=example.id,
            group=example.group,
            prompt=prompt.text,
            output=output,
            scores=score(example, output),
            truncated=prompt.truncated,
            shots=prompt.shots,
            n_prompt_tokens=prompt.tokens,
            n_output_tokens=len(lm.tok_encode(output, add_special_tokens=False)),
        )
