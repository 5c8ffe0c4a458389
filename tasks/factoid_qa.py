"""Factoid questions (FreebaseQA): does the model still know what the dense one knew?

    kick evaluate MODEL --suite factoid_qa --data DIR --param shots=3 --out RUN

The first of LLM-KICK's settings (arXiv 2310.01382). The completion alone is scored, never the prompt. Primary metric:
an accepted answer stands in the completion as whole words.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from kick.errors import DataError
from kick.jsonl import read_jsonl
from kick.spec import Seed, Spec
from kick.suite import DataSource, Example, Sample, Suite

from . import scoring, sources
from .free_answers import INSTRUCTION, METRICS, answer_freely, draw_shots
from .prompts import ChatTemplate, few_shot, fit, uses_chat

HUB = "microsoft/freebase_qa"


class FactoidQA(Suite):
    name = "factoid_qa"
    description = "short factual questions (FreebaseQA), answered freely"
    metrics = METRICS

    class Params(Spec):
        shots: int = Field(default=0, ge=0, description="solved questions in front, from the dev split")
        shot_seed: Seed = Field(default=0, description="which dev questions are the shots")
        chat_template: ChatTemplate = "off"
        max_new_tokens: int = Field(default=32, ge=1)

    def examples(self, source: DataSource) -> list[Example]:
        shots = draw_shots(_rows(source, "dev"), self.params.shots, self.params.shot_seed) if self.params.shots else []
        rows = _rows(source, "test")
        return [Example(row["id"], row["topic"], {**row, "shots": shots}) for row in rows]

    def answer(self, lm: Any, examples: Sequence[Example]) -> Iterator[Sample]:
        chat = uses_chat(lm, self.params.chat_template)
        prompts = [
            fit(lm, self.prompt(lm, chat, example), self.params.shots, self.params.max_new_tokens)
            for example in examples
        ]
        yield from answer_freely(lm, examples, prompts, chat, self.params.max_new_tokens)

    def record(self, lm: Any) -> dict[str, Any]:
        return {"chat_template": uses_chat(lm, self.params.chat_template)}

    @staticmethod
    def prompt(lm: Any, chat: bool, example: Example) -> Callable[[int], str]:
        """The prompt with so many shots; without a chat template no LM is needed."""
        shots = [(f"Question: {question}\nAnswer:", answer) for question, answer in example.content["shots"]]
        question = f"Question: {example.content['question']}\nAnswer:"
        return lambda count: few_shot(lm, chat, "" if count else INSTRUCTION, shots[:count], question)


def _rows(source: DataSource, split: str) -> list[dict[str, Any]]:
    """Rows with id, topic, question and answers."""
    if source.kind == "embedded":
        path = sources.EMBEDDED / "factoid_qa" / f"{split}.jsonl"
        return [_checked(row, f"line {number} of {path}") for number, row in read_jsonl(path)]
    if source.kind == "hub":
        upstream = {"test": "test", "dev": "validation"}[split]
        return [
            _from_freebase(row, f"row {number} of {HUB}")
            for number, row in enumerate(sources.hub_rows(HUB, split=upstream, revision="refs/convert/parquet"), 1)
        ]
    file = {"test": "FreebaseQA-eval.json", "dev": "FreebaseQA-dev.json"}[split]
    path = sources.find(source.directory, f"freebaseqa/{file}", file, suite="factoid_qa")
    return [_from_freebase(row, f"question {number} of {path}") for number, row in enumerate(_questions(path), 1)]


def _questions(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["Questions"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a FreebaseQA file: {error!r}.", 'Expected {"Questions": [...]}.') from error


def _from_freebase(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A FreebaseQA question: each answer name of each parse is accepted. The hub turns records into columns."""
    try:
        names: list[str] = []
        for parse in _records(row["Parses"]):
            for answer in _records(parse["Answers"]):
                if not isinstance(answer["AnswersName"], list):
                    raise DataError(f"{where} has AnswersName {answer['AnswersName']!r}.", "Expected a list of names.")
                names += answer["AnswersName"]
        return _checked(
            {
                "id": row["Question-ID"],
                "topic": "FreebaseQA",
                "question": row["RawQuestion"],
                "answers": list(dict.fromkeys(names)),
            },
            where,
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{where} is not in FreebaseQA's schema: {error!r} is missing.", "See docs/data.md.") from error


def _records(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise DataError(f"{where} has no question.", "Correct the row or remove it.")
    answers = row.get("answers")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{where} has no list of answers.", "Correct the row or remove it.")
    if not any(scoring.normalize(answer) for answer in answers):
        raise DataError(
            f"{where} has no answer.", "A question needs at least one accepted answer: mend the row or remove it."
        )
    return {"id": str(row["id"]), "topic": str(row["topic"]), "question": row["question"], "answers": answers}
