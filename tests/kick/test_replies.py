"""Reading judges' replies: by hand, and real ones that others published with what they made of them."""

import json
from collections import Counter

import pytest

from kick.judge.questions import Judgment, PairRatings, Ratings, Winner, outcome
from kick.judge.replies import read_reply

RATING = Ratings(("rating",))
CRITERIA = Ratings(("coherence", "fluency"))
ONE_PAIR = PairRatings(("score",))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"rating": 7}', 7),
        ('Good, but short.\n\n```json\n{"rating": 7.5}\n```', 7.5),
        ("Rating: [[8]]", 8),
        ("[[ 8 ]]", 8),
        ("[[8]] as said, [[8]]", 8),
        ("Rating: [[8]] or rather [[9]]", None),  # it cannot make up its mind
        ('[[8]] {"rating": 9}', None),
        ("Rating: [[0]]", None),
        ("Rating: [[11]]", None),
        ('{"rating": "7"}', None),
        ('{"rating": true}', None),
        ('{"rating": NaN}', None),
        ('{"score": 7}', None),
        ("Rating: 8", None),
        ("8", None),
        ("[[good]]", None),
        ("", None),
        ('{"rating": 7', None),
        ('{"a": {"rating": 3}} {"rating": 7}', 7),
    ],
)
def test_one_rating(reply, expected):
    answer = read_reply(reply, RATING)
    assert answer == (None if expected is None else {"rating": expected})


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("My verdict: [[A]]", "A"),
        ("[[B]]", "B"),
        ("[[C]]", "tie"),
        ('{"winner": "tie"}', "tie"),
        ("[[A]] ... on reflection [[B]]", None),
        ("A is better", None),
        ('{"winner": "a"}', None),
    ],
)
def test_a_winner(reply, expected):
    assert read_reply(reply, Winner()) == (None if expected is None else {"winner": expected})


def test_every_criterion_must_be_there():
    assert read_reply('{"coherence": 3, "fluency": 9}', CRITERIA) == {"coherence": 3, "fluency": 9}
    assert read_reply('{"coherence": 3}', CRITERIA) is None
    assert read_reply('{"coherence": 3, "fluency": 12}', CRITERIA) is None


def test_two_scores_a_line():
    form = PairRatings(("coherence", "fluency"))
    assert read_reply("8 7\n9 8.5\nBoth are fine.", form) == {"coherence": [8, 7], "fluency": [9, 8.5]}
    assert read_reply("8 7\nBoth are fine.", form) is None
    assert read_reply("8 7 6\n9 8", form) is None
    assert read_reply("8 17\n9 8", form) is None
    assert read_reply('{"coherence": [8, 7], "fluency": [9, 8]}', form) == {"coherence": [8, 7], "fluency": [9, 8]}


def test_schemas_describe_what_is_read():
    for form, good, bad in [
        (RATING, {"rating": 5}, {"rating": 0}),
        (Winner(), {"winner": "A"}, {"winner": "C"}),
        (ONE_PAIR, {"score": [1, 10]}, {"score": [1]}),
    ]:
        schema = form.schema()
        assert schema["required"] == ["reasons", *good]  # a judge reasons before it grades
        assert schema["additionalProperties"] is False
        assert form.read(good) == good
        assert form.read(bad) is None


def judged(order, winner):
    answer = None if winner is None else {"winner": winner}
    return Judgment("x", "1-1", "pair", order, 0, answer, None, "", "j", "k", 1, 0, 0)


@pytest.mark.parametrize(
    ("ab", "ba", "expected"),
    [
        ("A", "B", 1.0),  # the answer won in both places
        ("B", "A", 0.0),
        ("tie", "tie", 0.5),
        ("A", "A", 0.5),  # whatever stood first won
        ("A", "tie", 0.5),
        ("A", None, None),
        (None, None, None),
    ],
)
def test_both_orders_make_one_outcome(ab, ba, expected):
    assert outcome([judged("ab", ab), judged("ba", ba)]) == expected


def test_one_order_is_not_enough():
    assert outcome([judged("ab", "A")]) is None


# Real replies


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


@pytest.mark.parametrize("folder", ["jxiw_mamba_zephyr", "medusa_vicuna-7b", "edge_dup_and_minus1"])
def test_mt_bench_ratings_are_read_as_fastchat_read_them(mirror, folder):
    rows = read(mirror / f"mt_bench/model_judgment/{folder}/gpt-4_single.jsonl")
    for row in rows:
        answer = read_reply(row["judgment"], RATING)
        assert answer == (None if row["score"] == -1 else {"rating": row["score"]}), row["question_id"]


def test_pairwise_verdicts_in_both_orders(mirror):
    """g1 shows model_1 first, g2 model_2: model_1 wins 18, model_2 20, 8 ties agreed, 2 rows with an error."""
    rows = read(mirror / "mt_bench/model_judgment/pair_phi3/gpt-4_pair.jsonl")
    agreed, failed = Counter(), 0
    for row in rows:
        first, second = (read_reply(row[f"{game}_judgment"], Winner()) for game in ("g1", "g2"))
        found = outcome(
            [judged("ab", first and first["winner"]), judged("ba", second and second["winner"])],
        )
        failed += found is None
        if first and second:
            same = (first["winner"], second["winner"]) in (("A", "B"), ("B", "A"), ("tie", "tie"))
            agreed[found if same else "disagree"] += 1
    assert (len(rows), failed) == (75, 2)
    assert (agreed[1.0], agreed[0.0], agreed[0.5]) == (18, 20, 8)
    assert agreed["disagree"] == 75 - 2 - 46  # each a tie


def test_llm_kicks_summaries_are_read_as_llm_kick_read_them(mirror):
    form = PairRatings(("coherence", "consistent", "fluency", "relevance"))
    folder = mirror / "llm_kick/in-context_summarization/compressed_answers/vicuna7b"
    files = sorted(folder.rglob("*_evaluation.jsonl"))
    rows = [row for path in files for row in read(path)]
    outside = [row for row in rows if any(not 1 <= value <= 10 for pair in row["score"].values() for value in pair)]
    assert (len(rows), len(outside)) == (180, 6)  # 0 on a scale from 1, for three empty summaries: no answer
    for row in rows:
        assert read_reply(row["text"], form) == (None if row in outside else row["score"])


@pytest.mark.parametrize(
    ("method", "lost", "found_again", "unreadable"),
    # magnitude: 6 lost; three begin "8.5/10 for Assistant 1, ...", of three that reason first one ends in two lines
    [("magnitude", 6, 3 + 1, 2), ("wanda", 14, 2 + 1, 14 - 3)],
)
def test_llm_kicks_conversations_and_the_replies_that_its_parser_lost(mirror, method, lost, found_again, unreadable):
    rows = read(mirror / f"llm_kick/mt_conversation/logs/{method}/answer_0.0_unstructured_evaluation.jsonl")
    again = failed = 0
    for row in rows:
        answer = read_reply(row["text"], ONE_PAIR)
        if row["score"] == [-1, -1]:
            again += answer is not None
            failed += answer is None
        else:
            assert answer == {"score": row["score"]}, row["question_id"]
    assert (again + failed, again, failed) == (lost, found_again, unreadable)
