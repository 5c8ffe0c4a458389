"""MMLU: four-option questions over 57 subjects, options ranked by likelihood.

    kick evaluate MODEL --suite mmlu --data DIR --param shots=5 --param format=cloze --out RUN

Hendrycks et al., arXiv 2009.03300; the second of LLM-KICK's settings. `format=letters` shows the options and ranks the
letters A to D; `format=cloze` shows only the question and ranks the texts of the options, by likelihood for each
character. Small models are at chance on letters while the texts still carry signal. `format=generated` shows the
options and reads the letter in what the model writes, as LLM-KICK did and as endpoints without likelihoods need it.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from kick.errors import DataError
from kick.lm import loglikelihoods
from kick.spec import Spec
from kick.suite import NOT_A_NUMBER, OVERALL, DataSource, Example, Metric, Sample, Suite

from . import sources
from .free_answers import written_answers
from .mmlu_subjects import CATEGORY
from .prompts import ChatTemplate, Prompt, few_shot, fit, uses_chat

HUB = "cais/mmlu"
LETTERS = "ABCD"


class MMLU(Suite):
    name = "mmlu"
    description = (
        "four-option questions over 57 subjects, ranked by likelihood (letters or texts) or by letters written"
    )
    metrics = (
        Metric("accuracy", value="correct", chance=0.25, unit="share of questions"),
        Metric("no_letter", value="no_letter", unit="share of answers", higher_is_better=False, descriptive=True),
    )

    class Params(Spec):
        shots: int = Field(default=5, ge=0, le=5, description="solved questions of the same subject in front")
        format: Literal["letters", "cloze", "generated"] = "letters"
        normalization: Literal["characters", "none"] = Field(
            default="characters", description="cloze: divide an option's log-likelihood by its characters, or not"
        )
        max_new_tokens: int = Field(default=16, ge=1, description="generated: the longest answer")
        subjects: tuple[str, ...] | None = Field(default=None, description="only these subjects")
        chat_template: ChatTemplate = "off"

    def examples(self, source: DataSource) -> list[Example]:
        subjects = self._subjects(source)
        examples = []
        for subject in subjects:
            shots = _rows(source, subject, "dev")[: self.params.shots] if self.params.shots else []
            if len(shots) < self.params.shots:
                raise DataError(
                    f"{self.params.shots} shots asked for; {subject} has {len(shots)} dev questions.", "Ask for fewer."
                )
            for number, row in enumerate(_rows(source, subject, "test")):
                examples.append(Example(f"{subject}-{number}", subject, {**row, "subject": subject, "shots": shots}))
        return examples

    def _subjects(self, source: DataSource) -> list[str]:
        """The subjects to ask: those named, or all that the source has (a folder may hold some of the 57)."""
        if self.params.subjects:
            unknown = [subject for subject in self.params.subjects if subject not in CATEGORY]
            if unknown:
                raise DataError(
                    f"'{unknown[0]}' is not a subject of MMLU.", "Known: " + ", ".join(sorted(CATEGORY)) + "."
                )
            return list(self.params.subjects)
        if source.kind == "hub":
            return sorted(CATEGORY)
        folder = _folder(source)
        present = [subject for subject in sorted(CATEGORY) if (folder / "test" / f"{subject}_test.csv").is_file()]
        if not present:
            raise DataError(f"{folder}/test holds no SUBJECT_test.csv of a known subject.", "See docs/data.md.")
        return present

    def batches(self, examples: Sequence[Example], size: int) -> list[list[Example]]:
        """One subject at a time: its questions share the examples in front of them."""
        by_subject = [list(rows) for _, rows in groupby(examples, key=lambda example: example.group)]
        return [batch for rows in by_subject for batch in super(MMLU, self).batches(rows, size)]

    def answer(self, lm: Any, examples: Sequence[Example]) -> Iterator[Sample]:
        chat = uses_chat(lm, self.params.chat_template)
        prompts = [self._fitted(lm, chat, example) for example in examples]
        if self.params.format == "generated":
            yield from written_answers(lm, examples, prompts, chat, self.params.max_new_tokens, _score_letter)
            return
        space = "" if chat else " "  # a turn of a conversation does not begin with a space
        pairs = [
            (prompt.text, f"{space}{option}")
            for example, prompt in zip(examples, prompts, strict=True)
            for option in self._options(example)
        ]
        values = iter(loglikelihoods(lm, pairs))
        for example, prompt in zip(examples, prompts, strict=True):
            choices = [
                {"text": option, "loglikelihood": next(values)[0], "correct": index == example.content["answer"]}
                for index, option in enumerate(self._options(example))
            ]
            yield self.sample(example, prompt, choices)

    def record(self, lm: Any) -> dict[str, Any]:
        return {"chat_template": uses_chat(lm, self.params.chat_template)}

    def sample(self, example: Example, prompt: Prompt, choices: list[dict[str, Any]]) -> Sample:
        by_character = self.params.format == "cloze" and self.params.normalization == "characters"
        ranks = [choice["loglikelihood"] / (max(1, len(choice["text"])) if by_character else 1) for choice in choices]
        best = ranks.index(max(ranks))
        return Sample(
            id=example.id,
            group=example.group,
            prompt=prompt.text,
            output=choices[best]["text"],
            choices=choices,
            # some rows hold one text twice: choosing the other copy of the right one is right
            scores={"correct": float(any(c["correct"] and c["text"] == choices[best]["text"] for c in choices))},
            truncated=prompt.truncated,
            shots=prompt.shots,
            n_prompt_tokens=prompt.tokens,
            error=NOT_A_NUMBER if any(map(math.isnan, ranks)) else None,
        )

    def length(self, example: Example) -> int:
        return len(example.content["question"]) + sum(map(len, example.content["choices"]))

    def groups_of(self, sample: Sample) -> list[str]:
        return [OVERALL, CATEGORY[sample.group], sample.group]

    def _options(self, example: Example) -> list[str]:
        return example.content["choices"] if self.params.format == "cloze" else list(LETTERS)

    def _fitted(self, lm: Any, chat: bool, example: Example) -> Prompt:
        room = self.params.max_new_tokens
        if self.params.format != "generated":
            room = max(len(lm.tok_encode(f" {option}", add_special_tokens=False)) for option in self._options(example))
        return fit(lm, self.prompt(lm, chat, example), len(example.content["shots"]), room)

    def prompt(self, lm: Any, chat: bool, example: Example) -> Callable[[int], str]:
        """The prompt with so many shots; without a chat template no LM is needed."""
        letters = self.params.format != "cloze"
        subject = example.content["subject"].replace("_", " ")
        kind = "multiple choice questions" if letters else "questions"
        header = f"The following are {kind} (with answers) about {subject}.\n\n"

        def ask(row: dict[str, Any]) -> str:
            if not letters:
                return f"Question: {row['question'].strip()}\nAnswer:"
            options = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, row["choices"], strict=True))
            return f"{row['question'].strip()}\n{options}Answer:"

        def answer(row: dict[str, Any]) -> str:
            return LETTERS[row["answer"]] if letters else row["choices"][row["answer"]]

        shots = [(ask(row), answer(row)) for row in example.content["shots"]]
        return lambda count: few_shot(lm, chat, header, shots[:count], ask(example.content))


# "A" before a blank and a word may be an article
_BEGINS = re.compile(r"\W*([A-D])(?:[^\w \t]|[ \t]*(?:[\n(]|$)|(?<=[B-D])[ \t])")
_NAMES = re.compile(r"(?i:answer(?:\s+is)?)\W*([A-D])\b(?:(?<=[B-D])|(?![ \t]+[a-z]))")


def read_letter(text: str) -> str | None:
    """The option that an answer names: the letter that it begins with, or that follows "answer" or "answer is".

    >>> [read_letter(text) for text in (" B", "(c) no", "C. Paris", "The answer is (D).", "A river", "D or E", "Paris")]
    ['B', None, 'C', 'D', None, 'D', None]
    """
    found = _BEGINS.match(text) or _NAMES.search(text)
    return found[1] if found else None


def _score_letter(example: Example, output: str) -> dict[str, float]:
    """An answer in which no letter can be read is wrong, and counted."""
    letter = read_letter(output)
    return {"correct": float(letter == LETTERS[example.content["answer"]]), "no_letter": float(letter is None)}


def _folder(source: DataSource) -> Path:
    if source.kind == "embedded":
        return sources.EMBEDDED / "mmlu"
    return sources.find(source.directory, "mmlu/test", "test", suite="mmlu").parent


def _rows(source: DataSource, subject: str, split: str) -> list[dict[str, Any]]:
    """Rows with question, choices [4] and answer (0-3)."""
    if source.kind == "hub":
        return _hub_split(split)[subject]
    path = _folder(source) / split / f"{subject}_{split}.csv"
    if not path.is_file():
        raise DataError(f"{path} is missing.", f"The suite 'mmlu' reads {split}/{subject}_{split}.csv.")
    found = []
    for number, (question, *choices, answer) in sources.read_csv(path, columns=6):
        letter = answer.strip()
        if len(letter) != 1 or letter not in LETTERS:
            given = f"the answer '{answer}'" if letter else "no answer"
            raise DataError(f"row {number} of {path} has {given}.", "Expected A, B, C or D in the sixth column.")
        found.append({"question": question, "choices": choices, "answer": LETTERS.index(letter)})
    return found


@cache
def _hub_split(split: str) -> dict[str, list[dict[str, Any]]]:
    """All subjects' rows of a split, in one download."""
    found: dict[str, list[dict[str, Any]]] = {subject: [] for subject in CATEGORY}
    for row in sources.hub_rows(HUB, "all", split=split):
        content = {"question": row["question"], "choices": list(row["choices"]), "answer": int(row["answer"])}
        found[row["subject"]].append(content)
    return found
