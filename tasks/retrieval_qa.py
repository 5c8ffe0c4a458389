"""Questions with evidence in front of them: closed book, the evidence that comes with a question, or what BM25 finds.

    kick evaluate MODEL --suite retrieval_qa --data DIR --param dataset=nq_open --param evidence=retrieved --out RUN

LLM-KICK's in-context retrieval-augmented QA (arXiv 2310.01382), on TriviaQA and NQ-open. Prompts differ in the evidence
alone. Evidence is whole passages, as many as the token budget holds; whether an accepted answer stands in them is
recorded, so that "the retriever missed" and "the model missed" are told apart.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from kick.errors import DataError
from kick.jsonl import read_jsonl
from kick.spec import Seed, Spec
from kick.suite import CHARACTERS_PER_TOKEN, OVERALL, DataSource, Example, Metric, Sample, Suite

from . import scoring, sources
from .free_answers import INSTRUCTION, METRICS, answer_freely, draw_shots
from .passages import Collection, Passage, cut
from .prompts import ChatTemplate, few_shot, fit, uses_chat

Dataset = Literal["triviaqa", "nq_open"]
Evidence = Literal["none", "given", "retrieved"]

_RECALL = (1, 5, 20)
_MOST = max(_RECALL)  # passages that are kept of each question
HOLDS, LACKS = "evidence holds the answer", "evidence lacks the answer"
_HUB = {"triviaqa": ("mandarjoshi/trivia_qa", "rc"), "nq_open": ("google-research-datasets/nq_open", None)}
_HUB_SHOTS = {"triviaqa": ("mandarjoshi/trivia_qa", "rc.nocontext"), "nq_open": _HUB["nq_open"]}
_SHOT_FILES = {
    "triviaqa": ("triviaqa/rc.train.jsonl", "triviaqa/hf_schema/rc_sample.train.jsonl"),
    "nq_open": ("natural_questions/NQ-open.train.jsonl",),
}
_FILES = {
    "triviaqa": (
        "triviaqa/rc.validation.jsonl",
        "triviaqa/hf_schema/rc_retrieved.validation.jsonl",
        "triviaqa/retrieved_ctxs/tqa_test_e5_wiki18_top3.jsonl",
    ),
    "nq_open": ("natural_questions/nq-open-oracle.jsonl", "natural_questions/NQ-open.dev.jsonl"),
}


class RetrievalQA(Suite):
    name = "retrieval_qa"
    description = "questions with evidence (TriviaQA, NQ-open): closed book, given, or retrieved by BM25"
    metrics = METRICS

    class Params(Spec):
        dataset: Dataset = "triviaqa"
        evidence: Evidence = Field(default="given", description="none: closed book; given; retrieved: by BM25")
        file: str | None = Field(default=None, description="inside the data folder, instead of the known names")
        evidence_tokens: int = Field(default=512, ge=1, description="what evidence may take, in whole passages")
        passage_words: int = Field(default=100, ge=10, description="longest passage that a document is cut into")
        shots: int = Field(
            default=0, ge=0, description="solved questions in front, without evidence, of the train split"
        )
        shot_seed: Seed = Field(default=0, description="which questions are the shots")
        chat_template: ChatTemplate = "off"
        max_new_tokens: int = Field(default=32, ge=1)

    def __init__(self, params: BaseModel | None = None) -> None:
        super().__init__(params)
        if self.params.evidence != "none":
            unit = "share of questions"
            self.metrics = (
                *METRICS,
                Metric("answer_in_evidence", value="answer_in_evidence", unit=unit, descriptive=True),
            )
        if self.params.evidence == "retrieved":
            self.metrics += tuple(
                Metric(f"recall@{k}", value=f"recall@{k}", unit=unit, descriptive=True) for k in _RECALL
            )

    def examples(self, source: DataSource) -> list[Example]:
        rows = _rows(source, self.params.dataset, self.params.file)
        if not rows:
            raise DataError(
                f"{source} holds no question of {self.params.dataset}.", "Its file is empty: download it again."
            )
        documents = [
            [passage for title, text in row.pop("documents") for passage in cut(title, text, self.params.passage_words)]
            for row in rows
        ]
        if self.params.evidence == "none":
            chosen: list[list[Passage]] = [[] for _ in rows]
        else:
            everything = [passage for passages in documents for passage in passages] + _distractors(source)
            if not everything:
                raise DataError(
                    f"the questions of {source} come without evidence.", "Ask them with evidence=none, closed book."
                )
            chosen = documents
            if self.params.evidence == "retrieved":
                chosen = Collection(everything).search([row["question"] for row in rows], _MOST)
        group = "embedded" if source.kind == "embedded" else self.params.dataset
        shots: list[list[str]] = []
        if self.params.shots:
            shots = draw_shots(_shot_rows(source, self.params.dataset), self.params.shots, self.params.shot_seed)
        return [
            Example(row.pop("id"), group, {**row, "passages": [each.to_json() for each in passages], "shots": shots})
            for row, passages in zip(rows, chosen, strict=True)
        ]

    def answer(self, lm: Any, examples: Sequence[Example]) -> Iterator[Sample]:
        chat = uses_chat(lm, self.params.chat_template)
        evidence = [self.evidence(lm, example) for example in examples]
        prompts = [
            fit(lm, self.prompt(lm, chat, example, shown), self.params.shots, self.params.max_new_tokens)
            for example, shown in zip(examples, evidence, strict=True)
        ]
        samples = answer_freely(lm, examples, prompts, chat, self.params.max_new_tokens, self.rule)
        for example, shown, sample in zip(examples, evidence, samples, strict=True):
            if self.params.evidence != "none":
                answers = example.content["answers"]
                holding = [scoring.contains(str(passage), answers, self.rule) for passage in _passages(example)]
                sample.scores["answer_in_evidence"] = max(holding[: len(shown)], default=0.0)
                if self.params.evidence == "retrieved":
                    sample.scores |= {f"recall@{k}": max(holding[:k], default=0.0) for k in _RECALL}
            yield sample

    def record(self, lm: Any) -> dict[str, Any]:
        return {"chat_template": uses_chat(lm, self.params.chat_template)}

    @property
    def rule(self) -> scoring.Rule:
        """How answers are normalised: each dataset as its own literature does it."""
        return "triviaqa" if self.params.dataset == "triviaqa" else "squad"

    def evidence(self, lm: Any, example: Example) -> list[Passage]:
        """The passages that fit into the budget, in order, up to the first that does not."""
        shown: list[Passage] = []
        room = self.params.evidence_tokens
        for passage in _passages(example):
            room -= len(lm.tok_encode(f"{passage}\n", add_special_tokens=False))
            if room < 0:
                break
            shown.append(passage)
        return shown

    @staticmethod
    def prompt(lm: Any, chat: bool, example: Example, shown: list[Passage]) -> Callable[[int], str]:
        """The prompt with so many shots; without a chat template no LM is needed."""
        evidence = "".join(f"{passage}\n" for passage in shown) + ("\n" if shown else "")
        shots = [(f"Question: {question}\nAnswer:", answer) for question, answer in example.content["shots"]]
        question = f"{evidence}Question: {example.content['question']}\nAnswer:"
        return lambda count: few_shot(lm, chat, INSTRUCTION, shots[:count], question)

    def length(self, example: Example) -> int:
        shown = sum(len(str(passage)) for passage in _passages(example))
        return len(example.content["question"]) + min(shown, CHARACTERS_PER_TOKEN * self.params.evidence_tokens)

    def groups_of(self, sample: Sample) -> list[str]:
        if "answer_in_evidence" not in sample.scores:
            return [OVERALL, sample.group]
        return [OVERALL, sample.group, HOLDS if sample.scores["answer_in_evidence"] else LACKS]


def _passages(example: Example) -> list[Passage]:
    return [Passage(**passage) for passage in example.content["passages"]]


# Rows: id, question, answers, documents [(title, text)]


def _rows(source: DataSource, dataset: Dataset, file: str | None) -> list[dict[str, Any]]:
    if source.kind == "embedded":
        return _embedded()
    if source.kind == "hub":
        name, config = _HUB[dataset]
        found = sources.hub_rows(name, config, split="validation")
        return _unique([_read(row, index, dataset, f"row {index} of {name}") for index, row in enumerate(found, 1)])
    candidates = (file,) if file else _FILES[dataset]
    path = sources.find(source.directory, *candidates, suite="retrieval_qa")
    return _unique([_read(row, number, dataset, f"line {number} of {path}") for number, row in read_jsonl(path)])


def _shot_rows(source: DataSource, dataset: Dataset) -> list[dict[str, Any]]:
    """Solved questions to show as examples: of the train split, or kick's own."""
    if source.kind == "embedded":
        return [row for _, row in read_jsonl(sources.EMBEDDED / "factoid_qa" / "dev.jsonl")]
    if source.kind == "hub":
        name, config = _HUB_SHOTS[dataset]
        found = list(enumerate(sources.hub_rows(name, config, split="train"), 1))
        return [_read(row, index, dataset, f"row {index} of {name}") for index, row in found]
    path = sources.find(source.directory, *_SHOT_FILES[dataset], suite="retrieval_qa")
    return _unique([_read(row, number, dataset, f"line {number} of {path}") for number, row in read_jsonl(path)])


_PASSAGES = sources.EMBEDDED / "retrieval_qa" / "passages.jsonl"


def _embedded() -> list[dict[str, Any]]:
    """The factoid questions that kick's own passages answer, each with those that do."""
    documents: dict[str, list[tuple[str, str]]] = {}
    for _, passage in read_jsonl(_PASSAGES):
        for id in passage["answers"]:
            documents.setdefault(id, []).append((passage["title"], passage["text"]))
    questions = [row for _, row in read_jsonl(sources.EMBEDDED / "factoid_qa" / "test.jsonl") if row["id"] in documents]
    return [_checked({**row, "documents": documents[row["id"]]}, row["id"]) for row in questions]


def _distractors(source: DataSource) -> list[Passage]:
    """Passages that answer no question: only the embedded collection has some of its own."""
    if source.kind != "embedded":
        return []
    return [Passage(row["title"], row["text"]) for _, row in read_jsonl(_PASSAGES) if not row["answers"]]


def _read(row: dict[str, Any], number: int, dataset: Dataset, where: str) -> dict[str, Any]:
    """Rows with `ctxs` are in the form of retrievers (DPR), whichever dataset they are of."""
    kind = _from_triviaqa if dataset == "triviaqa" else _from_nq
    try:
        return _checked((_from_contexts if "ctxs" in row else kind)(row, number), where)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where} is not in a schema of {dataset}: {error!r}.", "See docs/data.md.") from error


def _from_triviaqa(row: dict[str, Any], number: int) -> dict[str, Any]:
    pages, found = row.get("entity_pages") or {}, row.get("search_results") or {}
    documents = list(zip(pages.get("title", []), pages.get("wiki_context", []), strict=True))
    documents += list(zip(found.get("title", []), found.get("search_context", []), strict=True))
    answers = [row["answer"]["value"], *row["answer"].get("aliases", [])]
    return {"id": row["question_id"], "question": row["question"], "answers": answers, "documents": documents}


def _from_nq(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {"id": f"nq-{number}", "question": row["question"], "answers": row["answer"], "documents": []}


def _from_contexts(row: dict[str, Any], number: int) -> dict[str, Any]:
    documents = [(context["title"], context["text"]) for context in row["ctxs"]]
    id = row.get("id", f"row-{number}")
    return {"id": id, "question": row["question"], "answers": row["answers"], "documents": documents}


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    answers = list(dict.fromkeys(answer for answer in row["answers"] if scoring.normalize(answer)))
    if not isinstance(row["question"], str) or not row["question"].strip():
        raise DataError(f"{where} has no question.", "Correct the row or remove it.")
    return {
        **row,
        "id": str(row["id"]),
        "answers": answers,
        "documents": [(str(t), str(x)) for t, x in row["documents"]],
    }


def _unique(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """TriviaQA lists a question once for the web and once for Wikipedia: one question, with the documents of both."""
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["id"] in merged:
            merged[row["id"]]["documents"] += row["documents"]
        else:
            merged[row["id"]] = row
    return [row for row in merged.values() if row["answers"]]
