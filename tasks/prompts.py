"""Prompts that fit: few-shot examples in front of a question, dropped one by one where the context is full.

The same prompt goes to every setting: it depends on the tokenizer and the context length, not on the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kick.errors import ConfigError

ChatTemplate = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Prompt:
    """`truncated` says that even without examples the question did not fit whole."""

    text: str
    shots: int
    tokens: int
    truncated: bool


def fit(lm: Any, build: Callable[[int], str], shots: int, room_for_answer: int) -> Prompt:
    """The prompt `build(k)` with the largest k <= `shots` that leaves `room_for_answer` tokens of the context."""
    for count in range(shots, -1, -1):
        text = build(count)
        tokens = len(lm.tok_encode(text))
        if tokens + room_for_answer <= lm.max_length or count == 0:
            return Prompt(text, count, tokens, truncated=tokens + room_for_answer > lm.max_length)
    raise AssertionError("unreachable: a prompt without examples was built")


def uses_chat(lm: Any, wanted: ChatTemplate) -> bool:
    """Whether to wrap prompts in the model's chat template; `auto` does so where the model has one."""
    has = bool(getattr(lm, "has_chat_template", False))
    if wanted == "on" and not has:
        raise ConfigError("chat_template is on, but this model has no chat template.", "Set it to auto or off.")
    return has and wanted != "off"


def few_shot(lm: Any, chat: bool, instruction: str, shots: Sequence[tuple[str, str]], question: str) -> str:
    """Instruction, solved examples and the question, as one text or as turns of a conversation.

    shots: (question as asked, answer) pairs; `question` ends where the answer is to begin.
    """
    if not chat:
        solved = "".join(f"{asked} {answer}\n\n" for asked, answer in shots)
        return f"{instruction}{solved}{question}"
    turns = []
    for asked, answer in shots:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    turns.append({"role": "user", "content": question})
    turns[0] = {**turns[0], "content": instruction + turns[0]["content"]}
    return lm.apply_chat_template(turns)


def converse(lm: Any, chat: bool, history: Sequence[dict[str, str]]) -> str:
    """A conversation that ends where the assistant is to speak; without a chat template, plain speakers' names."""
    if chat:
        return lm.apply_chat_template(list(history))
    names = {"user": "User", "assistant": "Assistant"}
    return "".join(f"{names[turn['role']]}: {turn['content']}\n" for turn in history) + "Assistant:"
