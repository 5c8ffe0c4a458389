"""MT-Bench: two-turn conversations in eight categories, graded by a judge.

    kick evaluate MODEL --suite mt_bench --data DIR --out RUN        kick judge RUN --judge MODEL

Zheng et al., arXiv 2306.05685; LLM-KICK's instruction following (arXiv 2310.01382). A judge rates each turn from 1 to
10 (`rating`), and compares it with the dense model's own in both orders (`win_rate`: won 1, tie 0.5). Without a judge:
unique tokens, distinct n-grams, repetition and length. A sample is one turn; scores count a conversation as one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from kick.errors import ConfigError, DataError
from kick.jsonl import read_jsonl
from kick.judge.questions import Judgment, Question, Ratings, Winner, by_sample, outcome
from kick.lm import generate
from kick.spec import Seed, Spec
from kick.suite import CHARACTERS_PER_TOKEN, DataSource, Example, Metric, Sample, Score, Suite, count_left_out

from . import lexical, sources
from .prompts import ChatTemplate, Prompt, converse, fit, uses_chat

SPACE = "lmsys/mt-bench"  # on the hub


def _counted(name: str, unit: str, higher_is_better: bool = True) -> Metric:
    return Metric(name, value=name, per="turns", unit=unit, higher_is_better=higher_is_better, descriptive=True)


_LOWEST, _HIGHEST = 1.0, 10.0
RATING = Metric(
    "rating", value="ratings", per="rated", unit="1 to 10", chance=_LOWEST, bounds=(_LOWEST, _HIGHEST)
)  # the lowest says nothing
WIN_RATE = Metric("win_rate", value="wins", per="compared", unit="share of turns, ties half", descriptive=True)
"""No share of the dense model's, which is one half: a judge that cannot tell would make every model match."""

_SINGLE = """\
You grade the answers of AI assistants. Judge how well the answer serves the user: whether it does what was asked, is \
correct, is relevant and complete, and is clearly put. Length is no merit by itself. First say in a few sentences what \
is good and what is wrong, then rate the answer from 1 (useless) to 10 (could not be better)."""
_PAIR = """\
You compare the answers of two AI assistants, A and B, to the same user. Judge which serves the user better: does what \
was asked, is correct, relevant, complete and clearly put. Neither the order in which they are shown nor their length \
is a merit. First say in a few sentences how they differ, then decide: "A", "B", or "tie" if neither is better."""
_REFERENCE = " A reference answer is given: what contradicts it is wrong."
_SECOND = " Judge the answer to the user's second message; the first exchange is shown for context."


class MTBench(Suite):
    name = "mt_bench"
    most_at_once = 32
    description = "two-turn conversations in eight categories (MT-Bench), graded by a judge"
    needs_judge = True
    prompts_hold_answers = True
    judged_metrics = (RATING, WIN_RATE)
    metrics = (
        _counted("unique_tokens", "tokens an answer"),
        _counted("distinct_2", "share of 2-grams"),
        _counted("repetition", "share of 4-grams", higher_is_better=False),
        _counted("words", "words an answer"),
        _counted("empty", "share of answers", higher_is_better=False),
    )

    class Params(Spec):
        chat_template: ChatTemplate = "auto"
        max_new_tokens: int = Field(default=512, ge=1, description="for each turn")
        temperature: float = Field(default=0.0, ge=0, description="0 is greedy; LLM-KICK samples at 0.7")
        seed: Seed = Field(default=0, description="of sampling")

    class Judging(Spec):
        kinds: tuple[Literal["single", "pair"], ...] = Field(default=("single", "pair"), min_length=1)
        baseline: str = Field(
            default="dense", description="whose answers to compare with: a setting of the run, or a .jsonl file"
        )

    def examples(self, source: DataSource) -> list[Example]:
        return [
            Example(row["id"], row["category"], {"turns": row["turns"], "reference": row["reference"]})
            for row in _rows(source)
        ]

    def sample_ids(self, example: Example) -> list[str]:
        return [f"{example.id}-{turn}" for turn in range(1, len(example.content["turns"]) + 1)]

    def record(self, lm: Any) -> dict[str, Any]:
        return {"chat_template": uses_chat(lm, self.params.chat_template)}

    def answer(self, lm: Any, examples: Sequence[Example]) -> Iterator[Sample]:
        """All first turns in one go, then all second ones, each after the model's own first answer."""
        chat = uses_chat(lm, self.params.chat_template)
        histories: list[list[dict[str, str]]] = [[] for _ in examples]
        samples: list[list[Sample]] = [[] for _ in examples]
        for turn in range(max(len(example.content["turns"]) for example in examples)):
            asked = [index for index, example in enumerate(examples) if turn < len(example.content["turns"])]
            for index in asked:
                histories[index].append({"role": "user", "content": examples[index].content["turns"][turn]})
            prompts = [self._prompt(lm, chat, histories[index]) for index in asked]
            stops = [] if chat else ["\nUser:"]
            outputs = generate(
                lm,
                [prompt.text for prompt in prompts],
                stops,
                self.params.max_new_tokens,
                temperature=self.params.temperature,
                seed=self.params.seed,
            )
            for index, prompt, output in zip(asked, prompts, outputs, strict=True):
                histories[index].append({"role": "assistant", "content": output.strip()})
                samples[index].append(_sample(lm, examples[index], turn, prompt, output.strip()))
        for conversation in samples:
            yield from conversation

    def _prompt(self, lm: Any, chat: bool, history: Sequence[dict[str, str]]) -> Prompt:
        return fit(lm, lambda _: converse(lm, chat, history), 0, self.params.max_new_tokens)

    def length(self, example: Example) -> int:
        turns = example.content["turns"]
        return sum(map(len, turns)) + CHARACTERS_PER_TOKEN * self.params.max_new_tokens * len(turns)

    def groups_of(self, sample: Sample) -> list[str]:
        return [*super().groups_of(sample), f"turn {_turn_of(sample)}"]

    def judge_questions(
        self,
        judging: Any,
        examples: Mapping[str, Example],
        samples: Sequence[Sample],
        dense: Mapping[str, Sample],
    ) -> Iterator[Question]:
        answers = {sample.id: sample.output or "" for sample in samples}
        baseline = {id: sample.output or "" for id, sample in dense.items()}
        if judging.baseline.endswith(".jsonl"):
            baseline = read_answers(Path(judging.baseline))
        if "pair" in judging.kinds and not baseline and "kinds" in judging.model_fields_set:
            raise ConfigError(
                "there are no dense answers to compare with in this run.",
                "Set mt_bench.kinds to [single], or a baseline.",
            )
        for sample in samples:
            if sample.left_out:
                continue
            example = examples[sample.id]
            if "single" in judging.kinds:
                yield _single(example, sample, answers)
            if "pair" in judging.kinds and sample.id in baseline:
                yield from _pair(example, sample, answers, baseline)

    def score(self, samples: Iterable[Sample], judgments: Sequence[Judgment] = ()) -> list[Score]:
        samples = list(samples)
        single, pair = by_sample(judgments, "single"), by_sample(judgments, "pair")
        values: dict[Metric, dict[str, list[float]]] = {
            RATING: {id: [j.answer["rating"] for j in found if j.answer] for id, found in single.items()},
            WIN_RATE: {id: [] if (won := outcome(found)) is None else [won] for id, found in pair.items()},
        }
        usable = [sample for sample in samples if sample.left_out is None]
        values |= {metric: {s.id: [s.scores[metric.value]] for s in usable} for metric in self.metrics}
        return [
            _by_conversation(metric, group, members, values[metric])
            for group, members in self.members(samples).items()
            for metric in (*self.metrics, *self.judged_metrics)
            if values[metric] or metric in self.metrics
        ]


def _by_conversation(metric: Metric, group: str, samples: Sequence[Sample], values: Mapping[str, list[float]]) -> Score:
    """Turn by turn; those of one conversation are not independent, and are resampled as one."""
    scored = sorted((sample for sample in samples if values.get(sample.id)), key=lambda sample: sample.id)
    truncated, failed = count_left_out(samples, values)
    return Score(
        metric=metric,
        group=group,
        ids=tuple(sample.id for sample in scored),
        clusters=tuple(map(_conversation_of, scored)),
        value=np.array([sum(values[sample.id]) for sample in scored], dtype=np.float64),
        per=np.array([float(len(values[sample.id])) for sample in scored]),
        truncated=truncated,
        failed=failed,
    )


def _conversation_of(sample: Sample) -> str:
    return sample.id.rpartition("-")[0]


def _turn_of(sample: Sample) -> int:
    return int(sample.id.rpartition("-")[2])


def _sample(lm: Any, example: Example, turn: int, prompt: Prompt, output: str) -> Sample:
    tokens = lm.tok_encode(output, add_special_tokens=False)
    found = lexical.words(output)
    return Sample(
        id=f"{example.id}-{turn + 1}",
        group=example.group,
        prompt=prompt.text,
        output=output,
        scores={
            "unique_tokens": float(len(set(tokens))),
            "distinct_2": lexical.distinct(found, 2),
            "repetition": lexical.repetition(found),
            "words": float(len(found)),
            "empty": float(not output),
        },
        truncated=prompt.truncated,
        n_prompt_tokens=prompt.tokens,
        n_output_tokens=len(tokens),
    )


# What the judge is shown


def _single(example: Example, sample: Sample, answers: Mapping[str, str]) -> Question:
    turn = _turn_of(sample)
    empty = not answers[sample.id].strip()
    return Question(
        id=f"{sample.id} single",
        sample=sample.id,
        kind="single",
        system=_SINGLE + (_REFERENCE if example.content["reference"] else "") + (_SECOND if turn == 2 else ""),
        prompt=_references(example, turn) + _conversation("the assistant", example, turn, answers),
        form=Ratings(("rating",)),
        template="mt_bench single 1",
        settled={"rating": _LOWEST} if empty else None,
    )


def _pair(
    example: Example, sample: Sample, answers: Mapping[str, str], baseline: Mapping[str, str]
) -> Iterator[Question]:
    """The same comparison twice, with the order of the answers turned round. Equal answers are a tie unasked."""
    turn = _turn_of(sample)
    own, other = answers[sample.id].strip(), baseline[sample.id].strip()
    for order in ("ab", "ba"):
        first, second = (answers, baseline) if order == "ab" else (baseline, answers)
        winner = None
        if own == other:
            winner = "tie"
        elif not own or not other:
            winner = "A" if bool(own) == (order == "ab") else "B"
        yield Question(
            id=f"{sample.id} pair {order}",
            sample=sample.id,
            kind="pair",
            system=_PAIR + (_REFERENCE if example.content["reference"] else "") + (_SECOND if turn == 2 else ""),
            prompt=_references(example, turn)
            + _conversation("assistant A", example, turn, first)
            + _conversation("assistant B", example, turn, second),
            form=Winner(),
            template="mt_bench pair 1",
            order=order,
            settled={"winner": winner} if winner else None,
        )


def _references(example: Example, turn: int) -> str:
    shown = example.content["reference"][:turn]
    return "".join(f"=== Reference answer to message {n} ===\n{text}\n\n" for n, text in enumerate(shown, 1))


def _conversation(who: str, example: Example, turn: int, answers: Mapping[str, str]) -> str:
    lines = [f"=== Conversation with {who} ===\n"]
    for number in range(1, turn + 1):
        lines.append(f"--- User, message {number} ---\n{example.content['turns'][number - 1]}\n")
        lines.append(f"--- Answer of {who} ---\n{answers.get(f'{example.id}-{number}', '')}\n")
    return "".join([*lines, f"=== End of the conversation with {who} ===\n\n"])


# Rows


def _rows(source: DataSource) -> list[dict[str, Any]]:
    """Rows with id, category, turns and reference (one for each turn, or none), in FastChat's schema of files."""
    if source.kind == "hub":
        files = [sources.hub_file(SPACE, f"data/mt_bench/{name}", repo_type="space") for name in _FILES]
    elif source.kind == "embedded":
        files = [sources.EMBEDDED / "mt_bench" / name for name in _FILES]
    else:
        path = sources.find(source.directory, "mt_bench/question.jsonl", "question.jsonl", suite="mt_bench")
        files = [path, path.parent / _FILES[1]]
    references = read_answers(files[1], by_turn=False) if files[1].is_file() else None
    rows = []
    for number, row in read_jsonl(files[0]):
        where = f"line {number} of {files[0]}"
        try:
            id, turns = str(row["question_id"]), row["turns"]
            # where there is a file of references, it is what published scores were judged by
            reference = row.get("reference") or [] if references is None else references.get(id, [])
            rows.append({"id": id, "category": str(row["category"]), "turns": turns, "reference": reference})
        except KeyError as error:
            raise DataError(f"{where} is not in MT-Bench's schema: {error} is missing.", "See docs/data.md.") from error
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise DataError(f"{where} has turns {turns!r}.", "Expected a list of messages.")
    return rows


_FILES = ("question.jsonl", "reference_answer/gpt-4.jsonl")


def read_answers(path: Path, by_turn: bool = True) -> Any:
    """Answers in FastChat's schema: {"81-1": text, ...}, or by question: {"81": [first, second], ...}."""
    if not path.is_file():
        raise DataError(f"no file of answers {path}.", "Expected FastChat's model_answer/NAME.jsonl.")
    found: dict[str, list[str]] = {}
    for number, row in read_jsonl(path):
        try:
            found[str(row["question_id"])] = list(row["choices"][0]["turns"])
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"line {number} of {path} is no answer in FastChat's schema: {error!r}.",
                'Expected {"question_id": ..., "choices": [{"turns": [...]}]}.',
            ) from error
    if not by_turn:
        return found
    return {f"{id}-{turn}": text for id, turns in found.items() for turn, text in enumerate(turns, 1)}
