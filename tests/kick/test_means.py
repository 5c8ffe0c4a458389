"""Means over suites, places, and how far seeds lie apart."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from written_run import change_samples, write_run

from kick import compare
from kick.files import safe_name
from kick.report import read_results, write_report
from kick.suite import Metric, Score


def scores_of(*columns):
    """Scores of one suite, right or wrong by question."""
    metric = Metric("accuracy", value="correct")
    ids = tuple(f"q{n:03d}" for n in range(len(columns[0])))
    return [Score(metric, "overall", ids, np.array(c, dtype=float), np.ones(len(ids))) for c in columns]


def test_draws_of_all_settings_have_the_interval_of_each_by_itself():
    from kick.report.means import retained_draws

    rng = np.random.default_rng(1)
    dense, *others = scores_of(*(rng.random((4, 200)) < [[0.7], [0.6], [0.65], [0.2]]))
    draws, _ = retained_draws(dense, others)
    for own, other in zip(draws, others, strict=True):
        alone = compare.resampled_retained(dense, other)
        for quantile in (0.025, 0.5, 0.975):
            assert np.quantile(own, quantile) == pytest.approx(np.quantile(alone, quantile), abs=0.015)


def test_graded_scores_have_corners_of_their_own_in_every_setting():
    from kick.report.means import retained_draws

    rng = np.random.default_rng(2)
    dense, *others = scores_of(*(rng.beta(4, 20, (3, 18)) * [[1.0], [0.8], [0.3]]))
    for own, other in zip(retained_draws(dense, others)[0], others, strict=True):
        alone = compare.resampled_retained(dense, other)
        for quantile in (0.025, 0.5, 0.975):
            assert np.quantile(own, quantile) == pytest.approx(np.quantile(alone, quantile), abs=0.015)


def test_draws_by_hand():
    """Weights of three questions; the second model has no answer to the last."""
    from kick.report.means import _shares

    before = np.array([[[1.0, 1], [0, 1], [1, 1]], [[1, 1], [0, 1], [0, 0]]])
    after = np.array([[[1.0, 1], [1, 1], [0, 1]], [[0, 1], [0, 1], [0, 0]]])
    weights = np.array([[1.0, 1, 1], [2, 0, 1]])
    found = _shares(Metric("accuracy", value="correct"), weights, before, after)
    # (1 + 1 + 0) / 3 over (1 + 0 + 1) / 3, then (2 + 0) / 3 over (2 + 1) / 3; the second lost all it had
    assert found == pytest.approx(np.array([[1.0, 2 / 3], [0.0, 0.0]]))


def test_settings_of_one_ability_share_a_place_however_many_they_are():
    """Twelve have 66 pairs, of which at 95 % each some differ in most runs."""
    from kick.report.means import SuiteScores, means_and_places

    rng = np.random.default_rng(5)
    differ = 0
    names = [f"x@{n}" for n in range(12)]
    for _ in range(40):
        dense, *others = scores_of(*(rng.random((13, 150)) < 0.6))
        pairs = [compare.compare(dense, other, True) for other in others]
        _, places = means_and_places(names, [SuiteScores(dense, others, pairs)], set(names))
        differ += len(set(places.values())) > 1
    assert differ <= 7  # nominal 2 of 40; three standard errors are 4.1


def test_few_questions_tell_settings_of_one_ability_no_more_apart():
    from kick.report.means import SuiteScores, means_and_places

    rng = np.random.default_rng(6)
    differ = 0
    names = [f"x@{n}" for n in range(12)]
    for _ in range(40):
        dense, *others = scores_of(*np.clip(rng.normal(0.5, 0.1, (13, 10)), 0, 1))
        pairs = [compare.compare(dense, other, True) for other in others]
        _, places = means_and_places(names, [SuiteScores(dense, others, pairs)], set(names))
        differ += len(set(places.values())) > 1
    assert differ <= 8  # nominal 2 of 40; of ten questions the interval is approximate


def test_a_score_with_a_divisor_is_weighted_by_it():
    from kick.report.means import _shares

    metric = Metric("rating", value="ratings", per="rated")
    before, after = np.array([[[8.0, 2], [4, 1]]]), np.array([[[4.0, 2], [4, 1]]])
    found = _shares(metric, np.array([[1.0, 1], [0, 3]]), before, after)
    assert found == pytest.approx(np.array([[(8 / 3) / (12 / 3), 1.0]]))


def test_settings_that_cannot_be_told_apart_share_a_place(run):
    """magnitude@0.2 and wanda@0.1 keep everything, the other two lose 40 of 60 right answers, in the same questions."""
    places = read_results(run).places
    assert places == {"magnitude@0.2": 1, "wanda@0.1": 1, "magnitude@0.5": 3, "wanda@2:4": 3}
    page = (run / "leaderboard.md").read_text()
    assert "| 3 | magnitude@0.5 |" in page


def test_places_are_paired():
    """b is better than a on five questions and worse on none: intervals overlap widely, the difference does not."""
    from kick.report.means import _places, retained_draws

    base = [1.0] * 100 + [0.0] * 100
    worse, better = [1.0] * 60 + [0.0] * 140, [1.0] * 72 + [0.0] * 128
    dense, a, b = scores_of(base, worse, better)
    draws, _ = retained_draws(dense, [a, b])
    assert np.quantile(draws[0], 0.975) > np.quantile(draws[1], 0.025)
    assert _places(["a", "b"], np.array([0.6, 0.72]), draws, 200) == {"a": 2, "b": 1}


@pytest.mark.parametrize(("suites", "share"), [(1, 0.05), (6, 0.012), (6, 0.07), (10, 0.07), (6, 0.6), (6, 1.0)])
def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says(suites, share, monkeypatch):
    """Dense is right in 30 of 100; of these the compressed model keeps `share`, in every suite."""
    from kick.report import means

    monkeypatch.setattr(means, "RESAMPLES", 1000)
    rng = np.random.default_rng(5)
    held, trials, width = 0, 80, []
    for _ in range(trials):
        asked, points = [], []
        for suite in range(suites):
            right = rng.random(120) < 0.3
            before, after = scores_of(right, right & (rng.random(120) < share))
            ids = tuple(f"{suite} {id}" for id in before.ids)  # other questions: other draws
            asked.append((replace(before, ids=ids), [replace(after, ids=ids)]))
            points.append((right & after.value.astype(bool)).sum() / right.sum())
        interval = means.mean_interval(means.mean_draws(asked)[0], 120)
        assert interval.low <= np.mean(points) <= interval.high
        held += interval.low <= share <= interval.high
        width.append(interval.high - interval.low)
    assert held / trials > 0.88  # of 95 %, but for three standard errors
    assert np.mean(width) < 0.35 / suites**0.5


def test_suites_of_the_same_questions_are_drawn_together_though_some_are_cut():
    """Three copies of the same answers say no more than one; one or two of the dense model's are missing in two."""
    from kick.report import means

    rng = np.random.default_rng(7)
    right = rng.random(120) < 0.5
    dense, other = scores_of(right, right & (rng.random(120) < 0.8))

    def without(score, cut):
        return replace(score, ids=score.ids[cut:], value=score.value[cut:], per=score.per[cut:])

    copies = [(without(dense, cut), [without(other, cut)]) for cut in (0, 1, 2)]
    one = means.mean_interval(means.mean_draws(copies[:1])[0], 120)
    three = means.mean_interval(means.mean_draws(copies)[0], 118)
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.05)

    # other questions are three times as much data
    def renamed(score, number):
        return replace(score, ids=tuple(f"{number}{id}" for id in score.ids))

    others = [(renamed(own, n), [renamed(other, n)]) for n, (own, (other,)) in enumerate(copies)]
    apart = means.mean_interval(means.mean_draws(others)[0], 118)
    assert (apart.high - apart.low) * 3**0.5 == pytest.approx(one.high - one.low, rel=0.1)


def test_a_setting_with_few_answers_widens_no_other(tmp_path):
    settings = [("dense", 0.0), ("magnitude@0.2", 0.2), ("magnitude@0.5", 0.5)]
    whole = read_results(write_run(tmp_path / "whole", settings, ["factoid_qa"]))
    cut = write_run(tmp_path / "cut", settings, ["factoid_qa"])
    folder = cut / "evaluations/magnitude@0.5/factoid_qa"
    questions = whole.estimate("dense", "factoid_qa").n
    for kept, known in ((questions - 1, True), (questions * 9 // 10, False)):
        change_samples(folder, lambda row: row | {"error": "not judged"}, start=kept)
        results = read_results(cut)
        assert results.mean_retained("magnitude@0.2") == whole.mean_retained("magnitude@0.2")
        assert (results.mean_retained("magnitude@0.5") is not None) == known


def test_how_far_seeds_lie_apart(tmp_path):
    from kick.report.tables import seed_spread

    root = write_run(tmp_path / "run", [("dense", 0.0), ("magnitude@0.2", 0.2), ("magnitude@0.5", 0.5)], ["factoid_qa"])
    document = json.loads((root / "run.json").read_text())
    for seed, row in enumerate(document["settings"][1:]):
        row |= {"seed": seed, "label": f"twice@0.3#{seed}"}
        shutil.move(root / "evaluations" / row["name"], root / "evaluations" / safe_name(row["label"]))
    (root / "run.json").write_text(json.dumps(document))
    (row,) = seed_spread(read_results(root))
    # 60 and 20 right answers of the 97 questions that were whole
    assert (row["setting"], row["seeds"]) == ("twice@0.3", 2)
    assert row["mean"] == pytest.approx(40 / 97)
    assert row["deviation"] == pytest.approx((40 / 97) / 2**0.5)
    write_report(root)
    assert "Between seeds" in (root / "report.html").read_text(encoding="utf-8")


def test_turns_that_only_one_model_answered_count_for_neither():
    """Two conversations of two turns; the compressed model's answer to the last turn could not be scored."""
    from kick.report.means import retained_draws

    metric = Metric("rating", value="ratings", per="rated")
    ids, clusters = ("a1", "a2", "b1", "b2"), ("a", "a", "b", "b")
    dense = Score(metric, "overall", ids, np.array([8.0, 8, 4, 8]), np.ones(4), clusters=clusters)
    other = Score(metric, "overall", ids[:3], np.array([8.0, 8, 4]), np.ones(3), clusters=clusters[:3])
    draws, _ = retained_draws(dense, [other])
    assert draws == pytest.approx(np.ones_like(draws))  # on what both answered they are the same
