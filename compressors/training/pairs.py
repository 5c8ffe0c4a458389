"""Instruction pairs: conversations in which only the assistant's words are learned.

A row is {"instruction", "input", "output"}, {"prompt", "response"}, {"question", "answer"}, {"messages": [{"role",
"content"}]} or {"conversations": [{"from", "value"}]}.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, dropwhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kick.calibration import begin_of_text, is_hub, open_hub, text_files
from kick.errors import DataError
from kick.jsonl import read_jsonl

from .text import Batch

_PAIRS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"))
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_NAMES = {"system": "", "user": "User: ", "assistant": "Assistant:"}
Conversation = list[dict[str, str]]


class Pairs:
    """Batches of conversations, each padded to `length`; every epoch in another order.

    rows: (where it stands, row). left_out: how many had no answer within `length` tokens. Raises DataError if none is
    left, or for other rows.
    """

    def __init__(self, rows: Iterable[tuple[str, dict[str, Any]]], tokenizer: Any, length: int, seed: int) -> None:
        self.seed = seed
        self.rows: list[tuple[list[int], list[int]]] = []
        self.left_out = 0
        for where, row in rows:
            tokens, labels = encode(tokenizer, conversation(row, where))
            if any(label != -100 for label in labels[1:length]):
                self.rows.append((tokens[:length], labels[:length]))
            else:
                self.left_out += 1
        if not self.rows:
            raise DataError("no instruction pair is left.", f"Each needs an answer within {length} tokens.")
        self.length = length
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self.pad = tokenizer.eos_token_id or 0

    def batch(self, step: int, size: int) -> Batch:
        """Padding stands at the end, where causal attention keeps it from everything before."""
        drawn = [self._drawn(step * size + place) for place in range(size)]
        tokens = torch.full((size, self.length), self.pad)
        labels = torch.full((size, self.length), -100)
        for into, index in enumerate(drawn):
            row, wanted = self.rows[index]
            tokens[into, : len(row)] = torch.tensor(row)
            labels[into, : len(row)] = torch.tensor(wanted)
        lengths = [len(self.rows[index][0]) for index in drawn]
        origin = [f"pair {index}" for index in drawn]
        return Batch(tokens[:, : max(lengths)], labels[:, : max(lengths)], origin, lengths)

    def _drawn(self, place: int) -> int:
        epoch, within = divmod(place, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return int(self._order[within])

    def state_dict(self) -> dict[str, Any]:
        return {}  # a batch is a function of its step

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def find_pairs(source: str | Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]] | None:
    """(where it stands, row) of each row of a file, folder or hub id, if the first is a conversation; else None."""
    if not isinstance(source, str):
        return None
    if is_hub(source):
        stream = open_hub(source)
        rows = ((f"row {number} of {source}", dict(row)) for number, row in enumerate(stream, 1))
    else:
        files = [file for file in text_files(source) if _is_jsonl(file)]
        rows = ((f"line {number} of {file}", row) for file in files for number, row in read_jsonl(file))
    first = next(rows, None)
    return chain([first], rows) if first is not None and _turns(first[1]) is not None else None


def _is_jsonl(file: Path) -> bool:
    return file.name.removesuffix(".gz").endswith((".jsonl", ".json"))


def conversation(row: dict[str, Any], where: str) -> Conversation:
    turns = _turns(row)
    if turns is None or not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(
            f"{where} is no instruction pair: it has {', '.join(row) or 'nothing'}.",
            "Expected instruction and output, prompt and response, or messages with an assistant's turn.",
        )
    return list(dropwhile(lambda turn: turn["role"] == "assistant", turns))  # who was asked nothing teaches nothing


def _turns(row: dict[str, Any]) -> Conversation | None:
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if isinstance(row.get(key), list):
            turns = row[key]
            if all(isinstance(t, dict) and t.get(role) in _ROLES and isinstance(t.get(content), str) for t in turns):
                return [{"role": _ROLES[turn[role]], "content": turn[content]} for turn in turns]
            return None
    for asked, answered in _PAIRS:
        if isinstance(row.get(asked), str) and isinstance(row.get(answered), str):
            more = f"\n\n{row['input']}" if row.get("input") else ""
            return [
                {"role": "user", "content": row[asked] + more},
                {"role": "assistant", "content": row[answered]},
            ]
    return None


def encode(tokenizer: Any, turns: Conversation) -> tuple[list[int], list[int]]:
    """(tokens, labels): labels are -100 but on the assistant's words and the end of its turn."""
    tokens: list[int] = []
    labels: list[int] = []
    done = ""
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        asked, whole = _written(tokenizer, turns[:index], ask=True), _written(tokenizer, turns[: index + 1], ask=False)
        if not (asked.startswith(done) and whole.startswith(asked)):
            raise DataError("this model's chat template rewrites earlier turns.", "Tune on pairs of one turn.")
        for text, learned in ((asked[len(done) :], False), (whole[len(asked) :], True)):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            tokens += ids
            labels += ids if learned else [-100] * len(ids)
        done = whole
    return tokens, labels


def _written(tokenizer: Any, turns: Conversation, ask: bool) -> str:
    """The conversation as text, by the model's chat template or with speakers' names; `ask`: the assistant is next."""
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
    end = tokenizer.eos_token or "\n"
    first = tokenizer.decode(begin_of_text(tokenizer))
    lines = [
        f"{_NAMES[turn['role']]} {turn['content']}{end}"
        if turn["role"] == "assistant"
        else f"{_NAMES[turn['role']]}{turn['content']}\n"
        for turn in turns
    ]
    return first + "".join(lines) + (_NAMES["assistant"] if ask else "")
