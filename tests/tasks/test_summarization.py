"""Summaries: length classes, reference metrics by hand, what model and judge are shown."""

import json
from collections import Counter

import pytest
from kick_tasks import lexical
from kick_tasks.summarization import CRITERIA, Summarization, length_class, score_summary
from test_suites import ScriptedLM, suite

from kick.errors import ConfigError, DataError
from kick.judge.questions import Judgment
from kick.suite import DataSource, Example, Sample

EMBEDDED = DataSource.parse("embedded")
ARTICLE = "The cat sat on the mat. The dog ran in the park."
HIGHLIGHTS = "A cat sat on a mat.\nA dog ran."


def story(id="s1", article=ARTICLE, highlights=HIGHLIGHTS):
    words = len(article.split())
    return Example(id, length_class(words), {"id": id, "article": article, "highlights": highlights, "words": words})


def test_reference_metrics_by_hand():
    scores = score_summary("The cat sat on the mat.", ARTICLE, "A cat sat on a mat.")
    # of 6 words each: cat sat on mat are common, and in order; of 5 pairs each: cat-sat and sat-on
    assert scores["rouge1"] == pytest.approx(4 / 6)
    assert scores["rouge2"] == pytest.approx(2 / 5)
    assert scores["rougeL"] == pytest.approx(4 / 6)
    assert (scores["words"], scores["over_limit"], scores["compression"]) == (6.0, 0.0, 2.0)
    assert (scores["copied_4grams"], scores["novel_2grams"], scores["repetition"]) == (1.0, 0.0, 0.0)


def test_new_words_are_novel_and_an_empty_summary_has_nothing():
    scores = score_summary("The dog sat on the roof.", ARTICLE, HIGHLIGHTS)
    # 2-grams: the-dog, sat-on, on-the stand in the story; dog-sat, the-roof do not
    assert scores["novel_2grams"] == pytest.approx(2 / 5)
    assert scores["copied_4grams"] == 0.0
    empty = score_summary("", ARTICLE, HIGHLIGHTS)
    assert (empty["rouge1"], empty["rougeL"], empty["words"], empty["empty"]) == (0.0, 0.0, 0.0, 1.0)
    assert not {"compression", "copied_4grams", "novel_2grams", "repetition"} & empty.keys()  # of nothing
    assert (scores["empty"], empty["empty"]) == (0.0, 1.0)


def test_over_the_limit_means_more_than_150_words():
    assert [score_summary("word " * n, ARTICLE, HIGHLIGHTS)["over_limit"] for n in (150, 151)] == [0.0, 1.0]


def test_length_classes():
    assert [length_class(n) for n in (1, 470, 471, 789, 790, 5000)] == [
        "small", "small", "medium", "medium", "large", "large",
    ]  # fmt: skip


def test_the_model_sees_the_story_and_never_the_highlights():
    for chat in (False, True):
        lm = ScriptedLM(lambda prompt: " A summary. ", chat=chat)
        (sample,) = suite(Summarization).answer(lm, [story()])
        (prompt,) = lm.prompts
        assert ARTICLE in prompt
        assert "A dog ran." not in prompt
        assert "under 150 words" in prompt
        assert sample.output == "A summary."
        assert prompt.startswith("<user>") == chat
        assert Summarization().record(lm) == {"chat_template": chat}


def test_a_story_that_does_not_fit_is_truncated():
    lm = ScriptedLM(lambda prompt: "x", max_length=300)
    (sample,) = suite(Summarization).answer(lm, [story(article="word " * 100)])
    assert sample.truncated


def test_embedded_stories():
    examples = Summarization().examples(EMBEDDED)
    assert Counter(example.group for example in examples) == {"small": 6, "medium": 6, "large": 6}


def test_real_stories_are_in_one_class_each(mirror):
    examples = Summarization().examples(DataSource.parse(str(mirror)))
    assert len(examples) == 344
    for example in examples:
        words = len(example.content["article"].split())
        assert example.group == ("small" if words <= 470 else "medium" if words < 790 else "large")


def test_story_files_of_which_some_stand_in_two_folders(mirror):
    """LLM-KICK's 90 files hold 72 stories: 18 stood in two classes, some outside the bounds."""
    examples = suite(Summarization, file="cnn_dailymail/llm_kick_stories").examples(DataSource.parse(str(mirror)))
    assert len(examples) == 72
    rows = [
        json.loads(line)
        for line in (mirror / "cnn_dailymail/llm_kick_stories.jsonl").read_text(encoding="utf-8").split("\n")
        if line
    ]
    highlights = {row["id"]: row["highlights"] for row in rows}
    assert all(example.content["highlights"] == highlights[example.id] for example in examples)
    assert not any("@highlight" in example.content["article"] for example in examples)


@pytest.mark.parametrize("row", [{"id": "1", "article": "text"}, {"id": "1", "article": " ", "highlights": "x"}])
def test_malformed_rows(tmp_path, row):
    (tmp_path / "stories.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"line 1 of .* has no (highlights|article)"):
        suite(Summarization, file="stories.jsonl").examples(DataSource.parse(str(tmp_path)))


# The judge


def sample(id="s1", output="A cat.", **changes):
    return Sample(id, "small", "prompt", output=output, scores=score_summary(output, ARTICLE, HIGHLIGHTS), **changes)


def asked(samples, dense=(), **judging):
    judging = Summarization.Judging(**judging)
    examples = {s.id: story(s.id) for s in samples}
    return list(Summarization().judge_questions(judging, examples, samples, {s.id: s for s in dense}))


def test_the_judge_sees_story_reference_and_summary():
    (question,) = asked([sample()])
    assert ARTICLE in question.prompt
    assert HIGHLIGHTS in question.prompt
    assert "A cat." in question.prompt
    (question,) = asked([sample()], reference="none")
    assert HIGHLIGHTS not in question.prompt
    (question,) = asked([sample()], [sample(output="dense summary")], reference="dense")
    assert "dense summary" in question.prompt


def test_the_dense_summaries_as_references_must_be_there():
    with pytest.raises(ConfigError, match="not in this run"):
        asked([sample()], reference="dense")


def test_a_reference_from_a_file(tmp_path):
    (tmp_path / "gpt.jsonl").write_text(json.dumps({"id": "s1", "summary": "their summary"}) + "\n")
    (question,) = asked([sample()], reference=str(tmp_path / "gpt.jsonl"))
    assert "their summary" in question.prompt
    with pytest.raises(DataError, match="no file of summaries"):
        asked([sample()], reference="nowhere.jsonl")


def test_an_empty_summary_gets_the_lowest_grade_unasked():
    (question,) = asked([sample(output="  ")], protocol="both")
    assert question.settled == dict.fromkeys(CRITERIA, 1.0)


def judgment(id, answer, order=""):
    failed = None if answer else "unreadable"
    return Judgment(f"{id} {order}", id, "single", order, 0, answer, failed, "", "j", "k", 1, 0, 0)


def test_quality_is_the_mean_of_the_criteria():
    answer = {"coherence": 8, "consistency": 6, "fluency": 9, "relevance": 5}
    scores = {s.metric.name: s for s in Summarization().score([sample()], [judgment("s1", answer)])}
    assert scores["quality"].point == 7.0
    assert scores["fluency"].point == 9.0
    assert "rougeL" in scores


def test_with_both_shown_the_summarys_own_place_counts_and_both_orders_are_needed():
    def answer(first, second):
        return {name: [first, second] for name in CRITERIA}

    both = [judgment("s1", answer(8, 3), "ab"), judgment("s1", answer(2, 6), "ba")]
    scores = {s.metric.name: s for s in Summarization().score([sample()], both)}
    assert scores["quality"].point == 7.0  # 8 and 6
    half = [judgment("s1", answer(8, 3), "ab"), judgment("s1", None, "ba")]
    scores = {s.metric.name: s for s in Summarization().score([sample()], half)}
    assert (scores["quality"].n, scores["quality"].failed) == (0, 1)


# Counting words


def test_words_and_ngrams():
    assert lexical.words("It's 3 o'clock: well-known (and) déjà-vu!") == [
        "it's", "3", "o'clock", "well-known", "and", "déjà-vu",
    ]  # fmt: skip
    assert lexical.ngrams([1, 2, 3], 2) == [(1, 2), (2, 3)]
    assert lexical.ngrams([1], 2) == []
    assert (lexical.distinct([], 1), lexical.repetition([1, 2], 4), lexical.copied([], [1], 1)) == (0.0, 0.0, 0.0)
    assert lexical.repetition([1, 1, 1, 1, 1], 2) == 0.75
