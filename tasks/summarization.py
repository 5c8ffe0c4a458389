"""Summaries of news stories (CNN/DailyMail) in three classes of length: reference metrics, and a judge if there is one.

    kick evaluate MODEL --suite summarization --data DIR --out RUN       kick judge RUN --judge MODEL

LLM-KICK's in-context summarisation (arXiv 2310.01382): under 150 words, graded for coherence, consistency, fluency and
relevance. The model sees the story alone; highlights are for scoring. A story is in one class, by its own words.
ROUGE: Lin 2004, by the rouge-score library, with stemming.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from kick.errors import ConfigError, DataError
from kick.jsonl import read_jsonl
from kick.judge.questions import Judgment, PairRatings, Question, Ratings, by_sample
from kick.lm import generate
from kick.spec import Seed, Spec
from kick.suite import CHARACTERS_PER_TOKEN, DataSource, Example, Metric, Sample, Score, Suite, count_left_out

from . import lexical, sources
from .prompts import ChatTemplate, converse, fit, uses_chat

HUB = "abisee/cnn_dailymail"
SMALL, LARGE = 470, 790  # words of a story: at most SMALL, between, at least LARGE
LIMIT = 150  # words of a summary
CRITERIA = ("coherence", "consistency", "fluency", "relevance")
INSTRUCTION = (
    f"Summarize the following story in under {LIMIT} words. The summary should be coherent, consistent with the story, "
    "fluent, and limited to what is relevant."
)
_LOWEST, _HIGHEST = 1.0, 10.0

_CRITERIA_EXPLAINED = """\
coherence: it is well organised and reads as one text; consistency: everything in it is supported by the story; \
fluency: its sentences are well formed; relevance: it holds the main points of the story and nothing else."""
_RATE = (
    "You grade summaries of news stories. "
    + _CRITERIA_EXPLAINED
    + " First say in a few sentences what is good and what "
    "is wrong, then rate each criterion from 1 (worst) to 10 (best)."
)
_RATE_BOTH = (
    "You grade two summaries of the same news story, A and B. " + _CRITERIA_EXPLAINED + " The order in which they are "
    "shown is no merit. First say in a few sentences how they differ, then rate each criterion from 1 (worst) to 10 "
    "(best) for both."
)


def _judged(name: str) -> Metric:
    return Metric(
        name, value=name, per="rated", unit="1 to 10", chance=_LOWEST, bounds=(_LOWEST, _HIGHEST)
    )  # the lowest says nothing


class Summarization(Suite):
    name = "summarization"
    most_at_once = 32
    description = "summaries of news stories of three lengths (CNN/DailyMail): ROUGE, copying, and a judge's criteria"
    judged_metrics = (_judged("quality"), *map(_judged, CRITERIA))
    metrics = (
        Metric("rougeL", value="rougeL"),
        Metric("rouge1", value="rouge1"),
        Metric("rouge2", value="rouge2"),
        Metric("words", value="words", unit="words a summary", descriptive=True),
        Metric("empty", value="empty", unit="share of summaries", higher_is_better=False, descriptive=True),
        Metric("over_limit", value="over_limit", unit="share of summaries", higher_is_better=False, descriptive=True),
        Metric("compression", value="compression", unit="words of the story a word", descriptive=True),
        Metric("copied_4grams", value="copied_4grams", unit="share of 4-grams", descriptive=True),
        Metric("novel_2grams", value="novel_2grams", unit="share of 2-grams", descriptive=True),
        Metric("repetition", value="repetition", unit="share of 4-grams", higher_is_better=False, descriptive=True),
    )

    class Params(Spec):
        chat_template: ChatTemplate = "auto"
        max_new_tokens: int = Field(default=256, ge=1)
        temperature: float = Field(default=0.0, ge=0, description="0 is greedy; LLM-KICK samples at 0.7")
        seed: Seed = Field(default=0, description="of sampling")
        file: str | None = Field(default=None, description="inside the data folder: a .jsonl, or a folder of .story")

    class Judging(Spec):
        reference: str = Field(
            default="highlights", description="what the judge compares with: highlights, dense, none, or a .jsonl file"
        )
        protocol: Literal["rating", "both"] = Field(
            default="rating",
            description="rate the summary with the reference at hand, or rate it and the reference, in both orders",
        )

    def examples(self, source: DataSource) -> list[Example]:
        found: dict[str, Example] = {}
        for row in _rows(source, self.params.file):
            words = len(row["article"].split())
            found.setdefault(row["id"], Example(row["id"], length_class(words), {**row, "words": words}))
        return list(found.values())

    def record(self, lm: Any) -> dict[str, Any]:
        return {"chat_template": uses_chat(lm, self.params.chat_template)}

    def answer(self, lm: Any, examples: Sequence[Example]) -> Iterator[Sample]:
        chat = uses_chat(lm, self.params.chat_template)
        prompts = [
            fit(lm, partial(_prompt, lm, chat, example.content["article"]), 0, self.params.max_new_tokens)
            for example in examples
        ]
        stops = [] if chat else ["\n\n"]
        outputs = generate(
            lm,
            [prompt.text for prompt in prompts],
            stops,
            self.params.max_new_tokens,
            temperature=self.params.temperature,
            seed=self.params.seed,
        )
        for example, prompt, output in zip(examples, prompts, outputs, strict=True):
            yield Sample(
                id=example.id,
                group=example.group,
                prompt=prompt.text,
                output=output.strip(),
                scores=score_summary(output, example.content["article"], example.content["highlights"]),
                truncated=prompt.truncated,
                n_prompt_tokens=prompt.tokens,
                n_output_tokens=len(lm.tok_encode(output, add_special_tokens=False)),
            )

    def length(self, example: Example) -> int:
        return len(example.content["article"]) + CHARACTERS_PER_TOKEN * self.params.max_new_tokens

    def judge_questions(
        self,
        judging: Any,
        examples: Mapping[str, Example],
        samples: Sequence[Sample],
        dense: Mapping[str, Sample],
    ) -> Iterator[Question]:
        references = _references(judging.reference, examples, dense)
        for sample in samples:
            if sample.left_out is None:
                reference = references.get(sample.id, "")
                summary = (sample.output or "").strip()
                if judging.protocol == "both" and reference.strip() and summary:
                    yield from _both(sample.id, examples[sample.id].content["article"], summary, reference)
                else:
                    yield _one(sample.id, examples[sample.id].content["article"], summary, reference)

    def score(self, samples: Iterable[Sample], judgments: Sequence[Judgment] = ()) -> list[Score]:
        samples = list(samples)
        scores = super().score(samples)
        if any(judgment.repeat == 0 for judgment in judgments):
            rated = _rated(judgments)
            for group, members in self.members(samples).items():
                scores += [_judged_score(metric, group, members, rated) for metric in self.judged_metrics]
        return scores


def length_class(words: int) -> str:
    """
    >>> [length_class(words) for words in (470, 471, 789, 790)]
    ['small', 'medium', 'medium', 'large']
    """
    return "small" if words <= SMALL else "medium" if words < LARGE else "large"


def score_summary(summary: str, article: str, highlights: str) -> dict[str, float]:
    """Everything that can be said of a summary without a judge. ROUGE is F1; the sentences of highlights are lines."""
    own, source = lexical.words(summary), lexical.words(article)
    rouge = _rouge().score(highlights, summary)
    length = len(summary.split())
    found = {
        **{name: rouge[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")},
        "words": float(length),
        "empty": float(length == 0),
        "over_limit": float(length > LIMIT),
    }
    if length:  # what is not there copies nothing and is no compression
        found |= {
            "compression": len(article.split()) / length,
            "copied_4grams": lexical.copied(own, source, 4),
            "repetition": lexical.repetition(own),
        }
    if len(own) > 1:
        found["novel_2grams"] = 1 - lexical.copied(own, source, 2)
    return found


def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def _prompt(lm: Any, chat: bool, article: str, _: int = 0) -> str:
    if chat:
        return converse(lm, chat, [{"role": "user", "content": f"{INSTRUCTION}\n\n{article}"}])
    return f"{INSTRUCTION}\n\nStory: {article}\n\nSummary:"


# What the judge is shown, and what becomes of its ratings


def _references(reference: str, examples: Mapping[str, Example], dense: Mapping[str, Sample]) -> dict[str, str]:
    if reference == "none":
        return {}
    if reference == "highlights":
        return {id: example.content["highlights"] for id, example in examples.items()}
    if reference == "dense":
        if not dense:
            raise ConfigError("the dense model's summaries are not in this run.", "Take another `reference`.")
        return {id: sample.output or "" for id, sample in dense.items()}
    path = Path(reference)
    if not path.is_file():
        raise DataError(f"no file of summaries {path}.", "`reference` is highlights, dense, none, or a .jsonl file.")
    found = {}
    for number, row in read_jsonl(path):
        if not isinstance(row.get("id"), str) or not isinstance(row.get("summary"), str):
            raise DataError(f"line {number} of {path} has no id and summary.", "Correct the row.")
        found[row["id"]] = row["summary"]
    return found


def _one(id: str, article: str, summary: str, reference: str) -> Question:
    shown = f"=== Reference summary ===\n{reference}\n\n" if reference.strip() else ""
    return Question(
        id=f"{id} single",
        sample=id,
        kind="single",
        system=_RATE + (" A reference summary shows what matters; it need not be matched in words." if shown else ""),
        prompt=f"=== Story ===\n{article}\n\n{shown}=== Summary to grade ===\n{summary}\n\n=== End of the summary ===",
        form=Ratings(CRITERIA),
        template="summarization single 1",
        settled=None if summary else dict.fromkeys(CRITERIA, _LOWEST),  # an empty summary needs no judge
    )


def _both(id: str, article: str, summary: str, reference: str) -> Iterator[Question]:
    for order in ("ab", "ba"):
        first, second = (summary, reference) if order == "ab" else (reference, summary)
        yield Question(
            id=f"{id} both {order}",
            sample=id,
            kind="single",
            system=_RATE_BOTH,
            prompt=f"=== Story ===\n{article}\n\n=== Summary A ===\n{first}\n\n=== Summary B ===\n{second}\n\n"
            "=== End of the summaries ===",
            form=PairRatings(CRITERIA),
            template="summarization both 1",
            order=order,
        )


def _rated(judgments: Sequence[Judgment]) -> dict[str, list[dict[str, float]]]:
    """The ratings of each summary: one, or one for each order; none unless every order was answered."""
    found: dict[str, list[dict[str, float]]] = {}
    for id, own in by_sample(judgments, "single").items():
        answered = [judgment for judgment in own if judgment.answer is not None]
        found[id] = [judgment.own_ratings() for judgment in answered] if len(answered) == len(own) else []
    return found


def _judged_score(
    metric: Metric, group: str, samples: Sequence[Sample], rated: Mapping[str, list[dict[str, float]]]
) -> Score:
    names = CRITERIA if metric.name == "quality" else (metric.name,)
    kept = sorted(sample.id for sample in samples if rated.get(sample.id))
    truncated, failed = count_left_out(samples, rated)
    values = [[ratings[name] for ratings in rated[id] for name in names] for id in kept]
    return Score(
        metric=metric,
        group=group,
        ids=tuple(kept),
        value=np.array([sum(own) for own in values], dtype=np.float64),
        per=np.array([float(len(own)) for own in values]),
        truncated=truncated,
        failed=failed,
    )


# Rows: id, article, highlights


def _rows(source: DataSource, file: str | None) -> list[dict[str, str]]:
    if source.kind == "embedded":
        return _from_jsonl(sources.EMBEDDED / "summarization" / "stories.jsonl")
    if source.kind == "hub":
        found = sources.hub_rows(HUB, "3.0.0", split="test")
        return [_checked(row, f"row {number} of {HUB}") for number, row in enumerate(found, 1)]
    candidates = (file,) if file else ("cnn_dailymail/3.0.0/test.jsonl", "3.0.0/test.jsonl", "cnn_dailymail/stories")
    path = sources.find(source.directory, *candidates, suite="summarization")
    return [_from_story(story) for story in sorted(path.rglob("*.story"))] if path.is_dir() else _from_jsonl(path)


def _from_jsonl(path: Path) -> list[dict[str, str]]:
    return [_checked(row, f"line {number} of {path}") for number, row in read_jsonl(path)]


def _from_story(path: Path) -> dict[str, str]:
    """A .story file: the article, then each highlight after a line "@highlight". The id is its name."""
    article, *highlights = path.read_text(encoding="utf-8").split("@highlight")
    row = {"id": path.stem, "article": article.strip(), "highlights": "\n".join(each.strip() for each in highlights)}
    return _checked(row, str(path))


def _checked(row: Mapping[str, Any], where: str) -> dict[str, str]:
    for key in ("article", "highlights"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise DataError(f"{where} has no {key}.", "Expected CNN/DailyMail's schema: id, article, highlights.")
    id = row.get("id") or hashlib.sha1(row["article"].encode()).hexdigest()
    return {"id": str(id), "article": row["article"], "highlights": row["highlights"]}
