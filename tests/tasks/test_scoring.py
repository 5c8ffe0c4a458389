"""Each odd answer with its expected verdict; normalisation against rows that the dataset's authors normalised."""

import json

import pytest
from kick_tasks.scoring import contains, exact_match, normalize, token_f1

TWAIN = ["Mark Twain", "Samuel Clemens"]


@pytest.mark.parametrize(
    ("output", "answers", "exact", "inside", "f1"),
    [
        ("Mark Twain", TWAIN, 1, 1, 1.0),
        (" mark twain.\n", TWAIN, 1, 1, 1.0),
        ("The answer is Samuel Clemens", TWAIN, 0, 1, 2 * 0.5 / 1.5),  # four words without the article
        ("not Mark Twain", TWAIN, 0, 1, 2 * (2 / 3) / (2 / 3 + 1)),  # documented: containment reads no negation
        ("Twain", TWAIN, 0, 0, 2 * 0.5 / 1.5),
        ("", TWAIN, 0, 0, 0.0),  # empty is wrong
        ("...!?", TWAIN, 0, 0, 0.0),
        ("the", TWAIN, 0, 0, 0.0),
        ("youth2", ["U2"], 0, 0, 0.0),  # inside another word is not contained
        ("u2", ["U2"], 1, 1, 1.0),
        ("It was U2, I think", ["U2"], 0, 1, 2 * (1 / 5) / (1 / 5 + 1)),
        ("A Farewell to Arms", ["Farewell to Arms"], 1, 1, 1.0),  # articles do not count
        ("Beyoncé", ["beyoncé"], 1, 1, 1.0),
        ("the O’Neill", ["O'Neill"], 1, 1, 1.0),  # typographic and plain apostrophe
        ("1,066", ["1 066"], 1, 1, 1.0),
        ("1066", ["106"], 0, 0, 0.0),
        ("Rolling_Stones", ["The Rolling Stones"], 1, 1, 1.0),
        ("Paris " * 500, ["Paris"], 0, 1, 2 * (1 / 500) / (1 / 500 + 1)),
        ("anything", [], 0, 0, 0.0),
        ("anything", ["?"], 0, 0, 0.0),  # an answer that normalises to nothing is in no output
    ],
)
def test_verdicts(output, answers, exact, inside, f1):
    assert exact_match(output, answers) == exact
    assert contains(output, answers) == inside
    assert token_f1(output, answers) == pytest.approx(f1)


def test_normalisation_is_the_official_one(mirror):
    rows = json.loads((mirror / "triviaqa/verified/verified-wikipedia-dev.json").read_text(encoding="utf-8"))["Data"]
    pairs = [
        (alias, normalised)
        for row in rows
        for alias, normalised in [(row["Answer"]["Value"], row["Answer"]["NormalizedValue"])]
    ]
    assert len(pairs) > 200
    wrong = [(alias, normalize(alias), normalised) for alias, normalised in pairs if normalize(alias) != normalised]
    assert wrong == []


def test_stored_predictions_score_as_their_authors_scored_them(mirror):
    path = mirror / "triviaqa/predictions/tqa_search_r1_base.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    agree = sum(exact_match(row["pred"] or "", row["golden_answers"]) == row["metric_score"]["em"] for row in rows)
    assert len(rows) == 700
    assert agree >= 698  # they normalise as SQuAD does, which joins what punctuation parts ("U.S." is "us")
