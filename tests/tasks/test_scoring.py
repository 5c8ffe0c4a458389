"""Each odd answer with its expected verdict; normalisation against rows that the dataset's authors normalised."""

import json

import pytest
from kick_tasks import scoring
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


STORED = {
    "triviaqa/predictions/tqa_search_r1_base.jsonl": (0.5800, 0.6314, 0.6478),
    "natural_questions/predictions/nq_search_r1_base.jsonl": (0.3900, 0.4343, 0.4804),
}


@pytest.mark.parametrize("file", STORED)
def test_scores_that_others_stored(file, mirror):
    """Search-R1's own, by SQuAD's rule, row by row. Its containment is that of substrings, and an answer that
    normalises to nothing is contained in everything: where it differs from ours, one of the two is the reason.
    """
    rows = [json.loads(line) for line in (mirror / file).read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 700
    substrings = []
    for row in rows:
        output, answers, stored = row["pred"], row["golden_answers"], row["metric_score"]
        assert scoring.exact_match(output, answers, "squad") == stored["em"]
        assert scoring.token_f1(output, answers, "squad") == pytest.approx(stored["f1"], abs=1e-6)
        squashed = [scoring.normalize(answer, "squad") for answer in answers]
        substrings.append(float(any(answer in scoring.normalize(output, "squad") for answer in squashed)))
        assert substrings[-1] == stored["acc"]
        ours = scoring.contains(output, answers, "squad")
        if ours != stored["acc"]:
            given = scoring.normalize(output, "squad")
            inside = [answer for answer in squashed if answer in given]
            assert ours == 0.0
            assert all(answer == "" or f" {answer} " not in f" {given} " for answer in inside)
    means = [sum(row["metric_score"][key] for row in rows) / 700 for key in ("em", "acc", "f1")]
    assert means == pytest.approx(STORED[file], abs=1e-4)
    assert sum(substrings) / 700 == pytest.approx(means[1])
