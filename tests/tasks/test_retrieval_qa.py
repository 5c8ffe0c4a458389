"""Questions with evidence: passages, retrieval, budgets, and what is told apart."""

import json

import pytest
from kick_tasks import scoring
from kick_tasks.passages import Collection, Passage, cut
from kick_tasks.retrieval_qa import HOLDS, LACKS, RetrievalQA
from test_suites import ScriptedLM, suite

from kick.errors import DataError
from kick.suite import OVERALL, DataSource

ROWS = [
    {
        "question_id": "q1",
        "question": "Who painted the ceiling of the chapel?",
        "answer": {"value": "Michelangelo", "aliases": ["Michelangelo Buonarroti"]},
        "entity_pages": {
            "title": ["Chapel"],
            "wiki_context": ["The chapel stands by the river. " * 4 + "Its ceiling was painted by Michelangelo."],
        },
        "search_results": {"title": [], "search_context": []},
    },
    {
        "question_id": "q2",
        "question": "Which metal is drawn into filaments for lamps?",
        "answer": {"value": "Tungsten", "aliases": ["Wolfram"]},
        "entity_pages": {"title": ["Lamp"], "wiki_context": ["Lamps are made of glass."]},
        "search_results": {"title": ["Metals"], "search_context": ["Wolfram is drawn into filaments for lamps."]},
    },
]


@pytest.fixture
def mirror_of_two(tmp_path):
    (tmp_path / "triviaqa").mkdir()
    path = tmp_path / "triviaqa" / "rc.validation.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return DataSource.parse(str(tmp_path))


def ask(source, lm, **params):
    asked = suite(RetrievalQA, **params)
    return asked, list(asked.answer(lm, asked.examples(source)))


def test_documents_are_cut_into_passages_of_equal_length():
    words = [f"w{index}" for index in range(25)]
    passages = cut("T", " ".join(words), 10)
    assert [passage.text.split() for passage in passages] == [words[:9], words[9:17], words[17:]]
    assert cut("T", "  ", 10) == []


def test_bm25_finds_the_rarer_word_and_keeps_the_order_of_equals():
    texts = ["the red boat", "the blue boat", "a green boat sails", "a green boat sails"]
    collection = Collection([Passage("", text) for text in texts])
    assert len(collection.passages) == 3  # the last is held once
    (found,) = collection.search(["blue boat"], 2)
    assert [passage.text for passage in found] == ["the blue boat", "the red boat"]
    assert collection.search(["zebra", "the"], 2) == [[], []]


def test_closed_and_open_book_differ_in_the_evidence_alone(mirror_of_two):
    lm = ScriptedLM(lambda prompt: "Tungsten")
    prompts = {}
    for evidence in ("none", "given", "retrieved"):
        _, samples = ask(mirror_of_two, lm, evidence=evidence)
        prompts[evidence] = samples[1].prompt
    instruction = "Answer the question with a name or a few words.\n\n"
    question = "Question: Which metal is drawn into filaments for lamps?\nAnswer:"
    assert prompts["none"] == instruction + question
    given = "Lamp: Lamps are made of glass.\nMetals: Wolfram is drawn into filaments for lamps.\n"
    assert prompts["given"] == f"{instruction}{given}\n{question}"
    assert prompts["retrieved"].startswith(f"{instruction}Metals: Wolfram")
    assert prompts["retrieved"].endswith(f"\n\n{question}")


def test_what_the_retriever_missed_and_what_the_model_missed(mirror_of_two):
    answers = {"chapel?": "Raphael", "lamps?": "It is wolfram."}
    lm = ScriptedLM(lambda prompt: next(text for end, text in answers.items() if f"{end}\nAnswer:" in prompt))
    asked, samples = ask(mirror_of_two, lm, evidence="given", passage_words=10, evidence_tokens=25)
    # q1: three passages of at most ten words, of which two fit; the answer stands in the third
    assert [sample.scores["answer_in_evidence"] for sample in samples] == [0.0, 1.0]
    assert "Michelangelo" not in samples[0].prompt
    assert [sample.scores["contains"] for sample in samples] == [0.0, 1.0]
    assert [asked.groups_of(sample)[-1] for sample in samples] == [LACKS, HOLDS]
    scores = {(score.metric.name, score.group): score.point for score in asked.score(samples)}
    assert scores["contains", OVERALL] == 0.5
    assert (scores["contains", HOLDS], scores["contains", LACKS]) == (1.0, 0.0)
    assert scores["answer_in_evidence", OVERALL] == 0.5


def test_recall_counts_a_passage_with_any_accepted_answer(mirror_of_two):
    asked, samples = ask(mirror_of_two, ScriptedLM(), evidence="retrieved", evidence_tokens=1)
    assert [sample.scores["recall@1"] for sample in samples] == [1.0, 1.0]  # "Wolfram" is an alias
    assert [sample.scores["answer_in_evidence"] for sample in samples] == [0.0, 0.0]  # no passage fits into one token
    assert [metric.name for metric in asked.metrics][-3:] == ["recall@1", "recall@5", "recall@20"]
    assert suite(RetrievalQA, evidence="none").metrics[-1].name == "f1"


def test_a_question_of_two_domains_is_asked_once_with_both_documents(tmp_path):
    again = {**ROWS[0], "entity_pages": {"title": ["Painter"], "wiki_context": ["He was born in Caprese."]}}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], again)))
    (example,) = suite(RetrievalQA, file="rows.jsonl").examples(DataSource.parse(str(tmp_path)))
    assert [passage["title"] for passage in example.content["passages"]] == ["Chapel", "Painter"]


def test_rows_that_are_wrong_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    source = DataSource.parse(str(tmp_path))
    path.write_text(json.dumps({**ROWS[0], "answer": None}) + "\n")
    with pytest.raises(DataError, match=r"line 1 of .*rows.jsonl is not in a schema of triviaqa"):
        suite(RetrievalQA, file="rows.jsonl").examples(source)
    path.write_text(json.dumps({"question": "How many?", "answer": [7]}) + "\n")
    with pytest.raises(DataError, match=r"line 1 of .*rows.jsonl is not in a schema of nq_open"):
        suite(RetrievalQA, dataset="nq_open", file="rows.jsonl", evidence="none").examples(source)
    path.write_text(json.dumps({"question": "Who?", "answer": ["Me"]}) + "\n")
    with pytest.raises(DataError, match="come without evidence"):
        suite(RetrievalQA, dataset="nq_open", file="rows.jsonl").examples(source)
    assert len(suite(RetrievalQA, dataset="nq_open", file="rows.jsonl", evidence="none").examples(source)) == 1


def test_the_embedded_passages_answer_their_questions_among_distractors():
    source = DataSource.parse("embedded")
    given = suite(RetrievalQA).examples(source)
    assert len(given) >= 90
    for example in given:
        texts = [passage["text"] for passage in example.content["passages"]]
        assert texts
        assert all(scoring.contains(text, example.content["answers"]) for text in texts), example.id
    asked = suite(RetrievalQA, evidence="retrieved")
    samples = list(asked.answer(ScriptedLM(), asked.examples(source)))
    recall = {k: sum(sample.scores[f"recall@{k}"] for sample in samples) / len(samples) for k in (1, 5)}
    assert 0.5 < recall[1] < recall[5]  # the retriever misses some: there is something to tell apart
    held = {passage["text"] for example in asked.examples(source) for passage in example.content["passages"]}
    assert any("lighthouses" in text for text in held)  # a passage that answers nothing is found too


def test_real_rows(mirror):
    """BM25 over the gold passages of all questions finds one that holds the answer nearly always."""
    source = DataSource.parse(str(mirror))
    asked = suite(RetrievalQA, dataset="nq_open", evidence="retrieved")
    examples = asked.examples(source)
    assert len(examples) == 1866
    samples = list(asked.answer(ScriptedLM(), examples[:200]))
    assert sum(sample.scores["recall@20"] for sample in samples) / 200 > 0.9
    assert len(suite(RetrievalQA).examples(source)) == 196
