"""MT-Bench: conversations, what a judge is shown, and scores that others published from their judgments."""

import json

import pytest
from kick_tasks.mt_bench import MTBench, read_answers
from test_suites import ScriptedLM, suite

from kick.compare import compare
from kick.errors import ConfigError, DataError
from kick.judge.questions import Judgment, Ratings
from kick.judge.replies import read_reply
from kick.suite import DataSource, Example, Sample

EMBEDDED = DataSource.parse("embedded")


def conversation(id="7", reference=(), turns=("Name a river.", "And a longer one?")):
    return Example(id, "stem", {"turns": list(turns), "reference": list(reference)})


def answered(lm, *examples, **params):
    return list(suite(MTBench, **params).answer(lm, examples))


def test_the_second_turn_is_asked_after_the_models_own_first_answer():
    lm = ScriptedLM(lambda prompt: " The Nile." if "longer" in prompt else " The Rhine.", chat=True)
    first, second = answered(lm, conversation(), chat_template="on")
    assert lm.prompts == [
        "<user>Name a river.<assistant>",
        "<user>Name a river.<assistant>The Rhine.<user>And a longer one?<assistant>",
    ]
    assert (first.id, first.output, second.id, second.output) == ("7-1", "The Rhine.", "7-2", "The Nile.")
    assert [s.group for s in (first, second)] == ["stem", "stem"]


def test_a_model_without_a_chat_template_is_asked_plainly():
    lm = ScriptedLM(lambda prompt: " The Rhine.")
    answered(lm, conversation())
    assert lm.prompts[1] == "User: Name a river.\nAssistant: The Rhine.\nUser: And a longer one?\nAssistant:"
    assert lm.options["until"] == ["\nUser:"]


def test_first_turns_of_all_conversations_are_asked_in_one_go():
    lm = ScriptedLM(lambda prompt: "x")
    samples = answered(lm, conversation("a"), conversation("b"))
    assert [prompt.count("Assistant:") for prompt in lm.prompts] == [1, 1, 2, 2]
    assert [sample.id for sample in samples] == ["a-1", "a-2", "b-1", "b-2"]
    assert [id for e in ("a", "b") for id in MTBench().sample_ids(conversation(e))] == [s.id for s in samples]


def test_a_conversation_that_does_not_fit_is_truncated_and_said():
    lm = ScriptedLM(lambda prompt: "word " * 30, max_length=40)
    first, second = answered(lm, conversation(), max_new_tokens=10)
    assert (first.truncated, second.truncated) == (False, True)


def test_what_is_counted_without_a_judge():
    lm = ScriptedLM(lambda prompt: "a b a b a b")
    sample, _ = answered(lm, conversation())
    # 2-grams: ab ba ab ba ab, two of five distinct; 4-grams: abab baba abab, one of three stood before
    assert sample.scores == {
        "unique_tokens": 2.0,
        "distinct_2": 2 / 5,
        "repetition": pytest.approx(1 / 3),
        "words": 6.0,
        "empty": 0.0,
    }


def test_metrics_without_a_judge_count_a_conversation_as_one():
    samples = [sample(id, words=words) for id, words in (("a-1", 2.0), ("a-2", 4.0), ("b-1", 6.0), ("b-2", 8.0))]
    scores = {(s.metric.name, s.group): s for s in MTBench().score(samples)}
    overall = scores["words", "overall"]
    assert (overall.n, overall.clusters, overall.point) == (2, ("a", "a", "b", "b"), 5.0)
    assert overall.value.tolist() == [2.0, 4.0, 6.0, 8.0]
    assert scores["words", "turn 2"].point == 6.0
    assert "rating" not in {metric for metric, _ in scores}


def test_a_turn_that_one_model_lost_is_compared_for_neither():
    """Dense is rated 8 and 4, the other as well on first turns, and its second turns were cut off: nothing was won."""
    dense, other = [], []
    for number in range(20):
        dense += [single(f"{number}-1", 8), single(f"{number}-2", 4)]
        other += [single(f"{number}-1", 8)]
    samples = [sample(f"{number}-{turn}") for number in range(20) for turn in (1, 2)]
    whole, cut = (
        next(s for s in MTBench().score(samples, judged) if (s.metric.name, s.group) == ("rating", "overall"))
        for judged in (dense, other)
    )
    assert (whole.point, cut.point) == (6.0, 8.0)
    pair = compare(whole, cut, signal=True)
    assert (pair.n, pair.dense, pair.retained) == (20, 8.0, 1.0)


def single(id, rating):
    return Judgment(f"{id} single", id, "single", "", 0, {"rating": rating}, None, "", "j", "k", 1, 0, 0)


def test_without_dense_answers_a_comparison_that_was_asked_for_is_refused():
    with pytest.raises(ConfigError, match="no dense answers"):
        asked([sample("7-1")], kinds=["pair"])
    assert asked([sample("7-1")]).keys() == {"7-1 single"}  # not asked for by name: rated alone


def sample(id, output="text", group="math", truncated=False, **scores):
    counted = {"unique_tokens": 1.0, "distinct_2": 1.0, "repetition": 0.0, "words": 1.0, "empty": 0.0}
    return Sample(id, group, "prompt", output=output, scores={**counted, **scores}, truncated=truncated)


# Questions for the judge


def asked(samples, dense=(), example=None, **judging):
    example = example or conversation()
    found = MTBench().judge_questions(
        MTBench.Judging(**judging), {s.id: example for s in samples}, samples, {s.id: s for s in dense}
    )
    return {question.id: question for question in found}


def test_the_judge_sees_the_conversation_up_to_the_turn_that_it_grades():
    questions = asked([sample("7-1", "The Rhine."), sample("7-2", "The Nile.")], kinds=["single"])
    first, second = questions["7-1 single"], questions["7-2 single"]
    assert "Name a river." in first.prompt
    assert "The Nile." not in first.prompt
    assert second.prompt.index("Name a river.") < second.prompt.index("The Rhine.") < second.prompt.index("The Nile.")
    assert "second message" in second.system
    assert "second message" not in first.system
    assert "Reference" not in first.prompt + second.prompt


def test_references_go_to_the_judge():
    example = conversation(reference=["the Rhine", "the Nile"])
    questions = asked([sample("7-1", "A."), sample("7-2", "B.")], example=example, kinds=["single"])
    assert "the Nile" not in questions["7-1 single"].prompt  # would give the second question away
    assert "the Rhine" in questions["7-2 single"].prompt
    assert "contradicts" in questions["7-1 single"].system


def test_a_pair_is_shown_in_both_orders():
    questions = asked([sample("7-1", "own answer")], [sample("7-1", "dense answer")], kinds=["pair"])
    ab, ba = questions["7-1 pair ab"], questions["7-1 pair ba"]
    assert ab.prompt.index("own answer") < ab.prompt.index("dense answer")
    assert ba.prompt.index("dense answer") < ba.prompt.index("own answer")
    assert ab.system == ba.system


def test_what_was_cut_off_is_not_graded():
    assert asked([sample("7-1", truncated=True), sample("7-2")], kinds=["single"]).keys() == {"7-2 single"}


def test_answers_of_another_model_as_the_baseline(tmp_path):
    row = {"question_id": 7, "model_id": "m", "choices": [{"index": 0, "turns": ["other one", "other two"]}]}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    questions = asked([sample("7-2", "own")], kinds=["pair"], baseline=str(tmp_path / "m.jsonl"))
    assert "other two" in questions["7-2 pair ab"].prompt
    with pytest.raises(DataError, match="no file of answers"):
        asked([sample("7-2", "own")], kinds=["pair"], baseline=str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"question_id": 7}\n')
    with pytest.raises(DataError, match=r"line 1 of .* is no answer"):
        read_answers(tmp_path / "bad.jsonl")


# Rows


def test_embedded_prompts():
    examples = MTBench().examples(EMBEDDED)
    assert len(examples) == 24
    assert len({example.group for example in examples}) == 8
    assert all(len(example.content["turns"]) == 2 for example in examples)
    referenced = {e.group for e in examples if e.content["reference"]}
    assert referenced == {"math", "reasoning", "coding"}


def test_published_questions_and_references(mirror):
    examples = MTBench().examples(DataSource.parse(str(mirror)))
    assert len(examples) == 80
    groups = [example.group for example in examples]
    assert {groups.count(group) for group in groups} == {10}
    assert sum(bool(example.content["reference"]) for example in examples) == 30
    assert examples[0].content["turns"][0].startswith("Compose an engaging travel blog post")


# Published judgments


def judgments_of(rows):
    """FastChat's rows as kick's judgments, the judge's text read anew. Rows of one question count one by one."""
    for number, row in enumerate(rows):
        answer = read_reply(row["judgment"], Ratings(("rating",)))
        id = f"{row['question_id']}-{row['turn']}"
        failed = None if answer else "unreadable"
        yield Judgment(f"{id} {number}", id, "single", "", 0, answer, failed, row["judgment"], "gpt-4", "", 1, 0, 0)


def aggregated(rows):
    samples = [sample(id) for id in sorted({f"{row['question_id']}-{row['turn']}" for row in rows})]
    scores = MTBench().score(samples, list(judgments_of(rows)))
    return {score.group: score for score in scores if score.metric.name == "rating"}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def test_four_models_get_their_published_scores(mirror):
    rows = read(mirror / "mt_bench/model_judgment/jxiw_mamba_zephyr/gpt-4_single.jsonl")
    published = json.loads((mirror / "mt_bench/published_scores.json").read_text())
    assert len(published) == 4
    for expected in published:
        scores = aggregated([row for row in rows if row["model"] == expected["model"]])
        assert scores["overall"].point == expected["mean_all"]
        assert round(scores["overall"].point, 2) == pytest.approx(expected["published_mt_bench"], abs=0.0051)
        assert scores["turn 1"].point == expected["mean_turn_1"]
        assert scores["turn 2"].point == expected["mean_turn_2"]
        assert (scores["overall"].n, scores["overall"].failed) == (80, 0)


@pytest.mark.parametrize(
    ("model", "score"),
    [("vicuna-7b-v1.3", 6.1031), ("greedy", 5.8781), ("medusa", 5.9875)],
)
def test_three_more_published_scores(mirror, model, score):
    rows = read(mirror / "mt_bench/model_judgment/medusa_vicuna-7b/gpt-4_single.jsonl")
    names = {row["model"] for row in rows}
    (name,) = [name for name in names if model == name] or [name for name in names if model in name]
    assert round(aggregated([row for row in rows if row["model"] == name])["overall"].point, 4) == score


def test_repeated_judgments_count_one_by_one_and_a_lost_one_not_at_all(mirror):
    """As FastChat does: 320 rows for one model judged twice, one of them -1; their mean without it is 5.8589."""
    rows = read(mirror / "mt_bench/model_judgment/edge_dup_and_minus1/gpt-4_single.jsonl")
    score = aggregated(rows)["overall"]
    assert round(score.point, 4) == 5.8589
    assert (score.n, score.per.sum()) == (80, 319)
    assert score.failed == 0  # its other judgment was read


def test_a_turn_without_any_readable_judgment_is_failed():
    rows = [{"question_id": 1, "turn": turn, "judgment": text} for turn, text in ((1, "[[6]]"), (2, "no idea"))]
    score = aggregated(rows)["overall"]
    assert (score.point, score.n, score.failed) == (6.0, 1, 1)
