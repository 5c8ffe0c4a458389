"""The embedded sets: large enough, well formed, and without the faults that can be found by looking."""

from collections import Counter

import pytest
from kick_tasks import sources
from kick_tasks.factoid_qa import FactoidQA
from kick_tasks.mmlu import MMLU
from kick_tasks.mmlu_subjects import CATEGORY
from kick_tasks.perplexity import Perplexity
from kick_tasks.scoring import contains, normalize

from kick.suite import DataSource

EMBEDDED = DataSource.parse("embedded")


@pytest.fixture(scope="module")
def factoid():
    return FactoidQA(FactoidQA.Params(shots=5)).examples(EMBEDDED)


def test_there_are_enough_factoid_questions_over_enough_topics(factoid):
    assert len(factoid) >= 150
    assert len({example.group for example in factoid}) >= 12
    assert (
        len({example.id for example in factoid})
        == len({example.content["question"] for example in factoid})
        == len(factoid)
    )


def test_no_question_holds_its_own_answer(factoid):
    for example in factoid:
        assert not contains(example.content["question"], example.content["answers"]), example.id


def test_no_alias_repeats_another_or_says_nothing(factoid):
    for example in factoid:
        names = [normalize(answer) for answer in example.content["answers"]]
        assert all(names), example.id
        assert len(set(names)) == len(names), example.id


def test_shots_are_not_among_the_questions(factoid):
    shots = {question for example in factoid for question, _ in example.content["shots"]}
    assert not shots & {example.content["question"] for example in factoid}


def test_multiple_choice_covers_the_categories_with_balanced_letters():
    examples = MMLU(MMLU.Params(shots=5)).examples(EMBEDDED)
    assert len(examples) >= 120
    by_category = Counter(CATEGORY[example.group] for example in examples)
    assert set(by_category) == {"STEM", "humanities", "social sciences", "other"}
    assert min(by_category.values()) >= 30
    letters = Counter(example.content["answer"] for example in examples)
    assert max(letters.values()) - min(letters.values()) <= 2
    for example in examples:
        assert len(set(example.content["choices"])) == 4, example.id
        assert len(example.content["shots"]) == 5
        assert example.content["question"] not in [shot["question"] for shot in example.content["shots"]]


def test_no_multiple_choice_question_stands_twice():
    paths = (sources.EMBEDDED / "mmlu").glob("*/*.csv")
    questions = [row[0] for path in paths for _, row in sources.read_csv(path, columns=6)]
    assert len(questions) == len(set(questions)) >= 140


def test_the_prose_is_long_enough():
    examples = Perplexity(Perplexity.Params()).examples(EMBEDDED)
    assert sum(len(example.content["text"].encode()) for example in examples) >= 60_000
