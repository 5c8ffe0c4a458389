"""Tables, figures and the page, from a run directory written by hand: no model is needed to report."""

import csv
import html.parser
import json
import re
import shutil
import sys
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest
from written_run import SETTINGS, change_samples, write_run

from kick import cli, statistics
from kick.compare import compare
from kick.errors import RunError
from kick.report import read_results, tables, write_report
from kick.report.figures.style import Drawn
from kick.report.leaderboard import check_comparable, write_leaderboard
from kick.report.results import SettingResult
from kick.report.template import identifier, inline
from kick.settings import Setting, Stage
from kick.suite import Metric, Score


def rows(run):
    with open(run / "scores.csv", encoding="utf-8", newline="") as file:
        found = csv.DictReader(file)
        return {(row["setting"], row["suite"], row["metric"], row["group"]): row for row in found}


def test_scores_by_hand(run):
    found = rows(run)
    dense = found["dense", "factoid_qa", "contains", "overall"]
    # the last three prompts did not fit: they are counted, and the 60 right ones are of 97
    assert (dense["n"], dense["truncated"], dense["failed"]) == ("97", "3", "0")
    assert float(dense["score"]) == pytest.approx(60 / 97, rel=1e-5)
    assert (dense["verdict"], dense["p_value"], dense["retained"]) == ("", "", "1")
    small = found["magnitude@0.2", "factoid_qa", "contains", "overall"]
    assert (small["retained"], small["flips"], small["p_value"]) == ("1", "2", "1")
    large = found["magnitude@0.5", "factoid_qa", "contains", "overall"]
    assert (large["retained"], large["flips"], large["verdict"]) == ("0.333333", "40", "not matching")
    assert float(large["p_value"]) == pytest.approx(2 * 0.5**40, rel=1e-4)
    # perplexity: mean nll 2.495 against 1.3 times that
    worse = found["wanda@2:4", "perplexity", "perplexity", "overall"]
    assert float(worse["retained"]) == pytest.approx(2.718281828 ** (2.495 - 2.495 * 1.3), rel=1e-5)
    assert (worse["verdict"], worse["flips"]) == ("not matching", "")


def test_the_leaderboard_is_ordered_by_what_was_retained(run):
    order = [row["setting"] for row in tables.leaderboard(read_results(run))]
    assert order[0] == "dense"
    assert set(order[1:3]) == {"magnitude@0.2", "wanda@0.1"}
    text = (run / "leaderboard.md").read_text(encoding="utf-8")
    assert "| magnitude@0.5 | 50 % | 32 | 1.0 | 4 | 33 % [" in text
    assert "are stored dense" in text


def test_perplexity_enters_no_mean(run):
    assert read_results(run).task_suites == ["factoid_qa"]


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def test_what_a_model_says_stays_text(run):
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1  # the page's own
    assert "img" not in page.tags
    assert page.tags.count("h1") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    text = "".join(page.words)
    assert "<script>alert(1)</script>" in text
    assert "{{ 7 * 7 }}" in text
    assert "What did <b>model</b> lose?" in text


def test_the_page_needs_nothing_from_outside(run):
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert links
    assert all(value.startswith("#") for value in links)
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert (run / "report.html").stat().st_size < 1_000_000  # long outputs are shortened


def test_ids_in_the_page_are_unique(run):
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_page_says_where_each_method_stops_matching(run):
    text = "".join(Page((run / "report.html").read_text(encoding="utf-8")).words)
    # wanda's only sparsity loses nothing; magnitude's first keeps 60 of 60 by one lost and one won: too few to tell
    assert "wanda10 %" in text.replace("\n", "")
    assert "magnitudenone (20 %: undecided)" in text.replace("\n", "")
    assert "a dead column" in text
    assert "n to decide" in text


def test_what_is_left_above_chance_by_hand():
    from kick.report.html import _above_chance

    dense, other = ([1] * 50 + [0] * 50), ([1] * 40 + [0] * 60)
    ids, ones = tuple(map(str, range(100))), np.ones(100)
    metric = Metric("accuracy", value="correct", chance=0.25)
    first, second = (Score(metric, "overall", ids, np.array(v, dtype=float), ones) for v in (dense, other))
    pair = compare(first, second, signal=True)
    assert _above_chance(pair, 0.25) == pytest.approx(0.15 / 0.25)  # of .5 .25 lie above chance, of .4 .15
    assert _above_chance(pair, None) is None
    assert _above_chance(compare(first, second, signal=False), 0.25) is None


def test_a_failed_evaluation_is_shown_and_left_out(tmp_path):
    run = write_run(tmp_path / "run", SETTINGS, ["factoid_qa", "perplexity"], failing={("wanda@0.1", "factoid_qa")})
    write_report(run)
    row = rows(run)["wanda@0.1", "factoid_qa", "contains", "overall"]
    assert (row["n"], row["score"], row["verdict"]) == ("0", "", "")
    assert "it <i>broke</i>" in "".join(Page((run / "report.html").read_text(encoding="utf-8")).words)
    assert "failed" in (run / "leaderboard.md").read_text(encoding="utf-8")


def test_what_a_setting_has_not_answered_is_one_line_of_the_page(tmp_path):
    suites = ["factoid_qa", "perplexity"]
    run = write_run(tmp_path / "run", SETTINGS[:3], suites)
    for suite in suites:
        (run / "evaluations" / "magnitude@0.5" / suite / "scores.json").unlink()
    write_report(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("not answered yet") == 1 + len(suites)  # and in its cells of the leaderboard
    assert "failed" not in (run / "leaderboard.md").read_text(encoding="utf-8")
    assert "magnitude@0.5 on factoid_qa, perplexity: not answered yet" in page


def test_without_a_signal_there_is_no_verdict_and_no_mean(tmp_path, monkeypatch):
    monkeypatch.setattr("written_run.DENSE", [0] * 100)
    run = write_run(tmp_path / "run", SETTINGS, ["factoid_qa"])
    results = write_report(run)
    assert rows(run)["wanda@2:4", "factoid_qa", "contains", "overall"]["verdict"] == "no signal"
    assert results.task_suites == []
    assert results.mean_retained("wanda@2:4") is None
    with open(run / "leaderboard.csv", newline="") as file:
        assert next(csv.DictReader(file))["mean_retained"] == ""  # of dense: over no suite it kept nothing


def test_a_suite_on_which_dense_is_hardly_ever_right_enters_no_mean(tmp_path, monkeypatch):
    """Of 97 questions 3 right: at least 1.1 %, which is 34 % of the score. 6 right: 2.9 %, which is 46 %."""
    for right, suites in ((3, []), (6, ["factoid_qa"])):
        monkeypatch.setattr("written_run.DENSE", [1] * right + [0] * (100 - right))
        root = write_run(tmp_path / f"run-{right}", SETTINGS[:2], ["factoid_qa"])
        assert read_results(root).task_suites == suites


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(RunError, match="is not a run"):
        read_results(tmp_path)


def test_a_suite_may_score_by_choices(tmp_path, monkeypatch):
    """Whatever the report does to save memory, it does after a suite has scored its samples."""
    from kick_tasks.factoid_qa import FactoidQA

    seen = []
    score = FactoidQA.score

    def watching(self, samples, judgments=()):
        seen.extend(sample.prompt for sample in samples)
        return score(self, samples, judgments)

    monkeypatch.setattr(FactoidQA, "score", watching)
    read_results(write_run(tmp_path / "run", SETTINGS, ["factoid_qa"]))
    assert len(seen) == 500
    assert all(seen)


def test_edited_samples_are_not_scored(run, tmp_path):

    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "evaluations" / "dense" / "factoid_qa" / "samples.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"contains": 1.0', '"contains": 0.0', 1), encoding="utf-8")
    assert "not the ones that were scored" in read_results(tmp_path / "run").get("dense", "factoid_qa").reason


def test_suites_with_the_same_questions_are_resampled_together(tmp_path):
    """Two copies of one suite are no more evidence than one: the interval of the mean stays as wide."""
    alone = read_results(write_run(tmp_path / "one", SETTINGS, ["factoid_qa"])).mean_retained("magnitude@0.5")
    root = write_run(tmp_path / "two", SETTINGS, ["factoid_qa"])
    document = json.loads((root / "run.json").read_text())
    document["config"]["suites"].append({**document["config"]["suites"][0], "label": "again"})
    (root / "run.json").write_text(json.dumps(document))
    for folder in (root / "evaluations").iterdir():
        shutil.copytree(folder / "factoid_qa", folder / "again")
    assert read_results(root).mean_retained("magnitude@0.5") == alone


def test_json_is_json():
    from kick.files import to_json

    assert json.loads(to_json({"a": float("nan"), "b": [float("inf"), 1.5]})) == {"a": None, "b": [None, 1.5]}


def setting_result(level, weights=100, bits=32.0, parameters=1_000):
    def record(weights, bits, parameters):
        return {"layers": {"a": {"weights": weights}}, "bits_per_weight": bits, "parameters": parameters}

    setting = Setting(compressor="anything", level=level)
    return SettingResult(setting, record(weights, bits, parameters), record(100, 32.0, 1_000))


@pytest.mark.parametrize(
    ("level", "measured", "axis"),
    [
        ("0.5", {}, "sparsity"),
        ("2:4", {}, "sparsity"),
        ("4", {"bits": 4.3}, "bits"),
        ("0.5+4bit", {"bits": 4.3}, "sparsity"),
        ("1.3B", {"weights": 60, "parameters": 700}, "size"),
        ("", {}, "sparsity"),
        ("", {"bits": 4.3}, "bits"),
        ("", {"weights": 60, "parameters": 700}, "size"),
        ("", {"parameters": 1_100}, "sparsity"),  # an adapter: more parameters, no other shape
    ],
)
def test_a_setting_is_drawn_where_it_is_smaller_than_dense(level, measured, axis):
    result = setting_result(level, **measured)
    assert result.axis == axis
    assert result.parameters_removed == pytest.approx(1 - measured.get("parameters", 1_000) / 1_000)


def test_a_head_that_is_counted_makes_no_other_shape():
    """A quantised head stands in the record beside the blocks' linears; dense does not count it."""
    head, block = (setting_result("", bits=4.5) for _ in range(2))
    head.record["layers"]["lm_head"] = {"weights": 500}
    assert head.axis == "bits"
    block.record["layers"] |= {"lm_head": {"weights": 500}, "another.block": {"weights": 100}}
    assert block.axis == "size"


def test_what_perplexity_does_not_see(tmp_path):
    """Perplexity is exp(2.495) against exp(1.3 * 2.495) by hand: up by 111 %; with a wider margin a setting is seen."""
    root = write_run(tmp_path / "run", SETTINGS, ["factoid_qa", "perplexity"])
    results = read_results(root)
    assert tables.unseen_by_perplexity(results) == []
    results = replace(results, perplexity_margin=1.2)
    rows = tables.unseen_by_perplexity(results)
    assert [row["setting"] for row in rows] == ["magnitude@0.5", "wanda@2:4"]  # the others keep what they knew
    assert rows[0]["increase"] == pytest.approx(2.718281828 ** (0.3 * 2.495) - 1, rel=1e-5)
    assert [lost["suite"] for lost in rows[0]["lost"]] == ["factoid_qa"]
    write_report(root)
    assert (root / "figures" / "perplexity-against-capability.svg").is_file()
    assert "What perplexity does not see" in (root / "report.html").read_text()
    assert cli.main(["report", str(root), "--perplexity-margin", "1.2"]) == 0
    assert "whose perplexity rises by at most 120 %" in (root / "report.html").read_text()
    with pytest.raises(SystemExit):
        cli.main(["report", str(root), "--perplexity-margin", "-1"])


def test_the_noise_floor_is_the_dense_model_beside_itself(tmp_path):
    root = write_run(tmp_path / "run", [*SETTINGS, ("again", 0.0)], ["factoid_qa"])
    run = json.loads((root / "run.json").read_text())
    run["settings"][-1] |= {"compressor": "dense", "label": "again", "params": {"dtype": "bfloat16"}}
    (root / "run.json").write_text(json.dumps(run))
    results = read_results(root)
    assert [result.name for result in results.variants] == ["again"]
    assert "again" not in {result.name for result in results.compressed}
    (row,) = tables.noise(results)
    assert (row["suite"], row["pair"].flips) == ("factoid_qa", 40)
    write_report(root)
    assert "Noise floor" in (root / "report.html").read_text()


def test_two_settings_side_by_side(run, capsys):
    arguments = ["compare", str(run), "magnitude@0.2", "magnitude@0.5"]
    assert cli.main([*arguments, "--json"]) == 0
    found = {row["suite"]: row for row in json.loads(capsys.readouterr().out)["suites"]}
    factoid = found["factoid_qa"]
    # of the 97 that fit: the small one has q001 to q060 right, the large one q000 to q019
    assert (factoid["n"], factoid["lost"], factoid["won"]) == (97, 41, 1)
    assert factoid["retained"] == pytest.approx(20 / 60)
    assert factoid["verdict"] == "not matching"
    assert factoid["p_value"] == pytest.approx(2 * 43 * 0.5**42, rel=1e-6)  # 0 or 1 of 42 in one direction
    assert factoid["p_holm"] == pytest.approx(2 * factoid["p_value"])  # of two suites, the smaller p-value
    assert len(factoid["flipped"]) == 42
    assert factoid["flipped"][-1]["id"] == "q000"  # what was won comes last
    assert factoid["flipped"][0]["prompt"].endswith("Why?")
    assert found["perplexity"]["retained"] == 1.0
    assert cli.main([*arguments, "--show", "1"]) == 0
    text = capsys.readouterr().out
    assert "| factoid_qa (contains) | 97 | 0.619 | 0.206 | 33 %" in text
    assert "42 answers changed" in text
    assert "\u202e" not in text
    assert cli.main(["compare", str(run), "magnitude@0.2", "magnitude@0.6"]) == 2
    assert "Did you mean 'magnitude@0." in capsys.readouterr().err


def test_runs_become_one_site(tmp_path):
    first = write_run(tmp_path / "first", SETTINGS[:3], ["factoid_qa"])
    second = write_run(tmp_path / "second", [SETTINGS[0], SETTINGS[4]], ["factoid_qa", "perplexity"])
    out = tmp_path / "site"
    assert cli.main(["leaderboard", str(first), str(second), "--out", str(out)]) == 0
    rows = json.loads((out / "leaderboard.json").read_text())
    places = {row["setting"]: row["place"] for row in rows}
    assert places == {"dense": None, "magnitude@0.2": 1, "magnitude@0.5": 2, "wanda@2:4": 2}  # equal losses share one
    assert [row["setting"] for row in rows][:3] == ["dense", "dense", "magnitude@0.2"]
    with open(out / "leaderboard.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["place"] for row in table] == ["", "", "1", "2", "2"]
    assert table[2]["perplexity"] == ""  # that run did not ask it
    assert (out / "methods" / "wanda.html").is_file()
    page = (out / "index.html").read_text()
    assert "&lt;b&gt;model&lt;/b&gt;" in page
    assert "<b>model" not in page
    for target in re.findall(r'href="([^"]+)"', page):
        assert (out / unquote(target)).is_file(), target


def test_results_go_into_folders_of_their_own(run, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    for command in ("leaderboard", "report"):
        assert cli.main([command, str(run), "--out", str(tmp_path / "photos")]) == 2
        assert "is not empty and holds no " in capsys.readouterr().err
        for _ in range(2):  # into its own it writes again
            assert cli.main([command, str(run), "--out", str(tmp_path / command)]) == 0
        capsys.readouterr()
    assert cli.main(["leaderboard", str(run), "--out", str(run)]) == 2
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_models_with_other_tokens_are_compared_by_bytes(tmp_path):
    roots = [write_run(tmp_path / name, [SETTINGS[0], SETTINGS[2]], ["perplexity"]) for name in ("one", "other")]
    run = json.loads((roots[1] / "run.json").read_text())
    (roots[1] / "run.json").write_text(json.dumps(run | {"model": {**run["model"], "name": "another"}}))
    write_leaderboard(roots, tmp_path / "same")
    assert json.loads((tmp_path / "same/leaderboard.json").read_text())[0]["perplexity"] > 2
    for folder in (roots[1] / "evaluations").glob("*/perplexity"):
        # the same text in twice as many tokens
        change_samples(folder, lambda row: row | {"scores": row["scores"] | {"tokens": 2.0}})
    write_leaderboard(roots, tmp_path / "site")
    rows = json.loads((tmp_path / "site/leaderboard.json").read_text())
    bits = sum(2.0 + 0.01 * index for index in range(100)) / 0.693 / 400
    dense = {row["model"]: row["perplexity"] for row in rows if row["setting"] == "dense"}
    assert dense == {"<b>model</b>": pytest.approx(bits), "another": pytest.approx(bits)}
    assert "bits per byte" in (tmp_path / "site/index.html").read_text().replace("_", " ")


def test_what_other_judges_say_or_none_is_not_compared(tmp_path):
    """A suite that can be judged: in two runs by the same, in one by somebody else, in another by nobody."""

    def judged_by(name, judge):
        results = read_results(write_run(tmp_path / name, SETTINGS[:2], ["factoid_qa"]))
        results.suites["factoid_qa"].judged_metrics = (results.metric("factoid_qa"),)
        record = {"identity": {"model": judge}, "versions": [judge], "prompts": ["single"], "judge": {}}
        return replace(results, settings=results.settings[:1], judge=record)

    one, same, another, none = (
        judged_by(name, judge) for name, judge in zip("abcd", ["gpt-4", "gpt-4", "tiny", "gpt-4"], strict=True)
    )
    check_comparable([one, same])
    with pytest.raises(RunError, match=r"asked 'factoid_qa' differently: judge is .*tiny"):
        check_comparable([one, another])
    unjudged = replace(none, metrics={"factoid_qa": replace(none.metric("factoid_qa"), name="exact_match")})
    with pytest.raises(RunError, match="differently: metric is 'exact_match'"):
        check_comparable([one, unjudged])


def test_a_figure_in_a_page_has_ids_that_a_reference_can_hold(tmp_path):
    for name in ("flips", "nq evidence=given-flips", "nq evidence=none-flips", "mine (x)"):
        path = tmp_path / "figure.svg"
        path.write_text('<?xml version="1.0"?><svg><defs><g id="h1"/></defs><a href="#h1" fill="url(#h1)"/></svg>')
        text = inline(Drawn(name, "", "", path, 6.0))
        (own,) = re.findall(r'id="([\w-]+)"', text)
        assert f'href="#{own}" fill="url(#{own})"' in text
    assert identifier("a b") != identifier("a-b") != identifier("a=b")


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([(0.3, "matching"), (0.5, "matching"), (0.5, "not matching")], "30 % (50 %: 1 of 2 matching)"),
        ([(0.3, "matching"), (0.5, "undecided"), (0.5, "not matching")], "30 % (50 %: not matching)"),
        ([(0.5, "undecided")], "none (50 %: undecided)"),
        ([(-8.0, "matching"), (-4.0, "matching")], "4 bits"),
    ],
)
def test_how_far_a_method_matches_in_a_cell(verdicts, expected):
    from kick.report.html import _frontier_cell

    assert _frontier_cell(verdicts) == expected


def test_verdicts_that_do_not_hold_together_are_marked_wherever_they_stand(tmp_path, monkeypatch):
    """Forty verdicts by chance alone: each has a p-value of its own of .04, forty times that is none."""
    run = write_run(tmp_path / "run", SETTINGS, ["factoid_qa"])
    results = read_results(run)
    assert all(results.holds(setting, "factoid_qa") for setting, _ in SETTINGS)
    assert "†" not in tables.leaderboard_markdown(results).partition("\n\n")[0]
    monkeypatch.setattr(statistics, "verdict_p", lambda retained, interval, n: 0.04)
    results = read_results(run)
    decided = {row["setting"]: row["factoid_qa_verdict"] for row in tables.leaderboard(results)}
    assert decided["magnitude@0.5"] == "not matching"
    for setting, verdict in decided.items():
        assert results.holds(setting, "factoid_qa") == (verdict not in ("matching", "not matching"))
    text = tables.leaderboard_markdown(results).partition("\n\n")[0]
    assert text.count("not matching †") == list(decided.values()).count("not matching")
    write_report(run)
    page = (run / "report.html").read_text()
    assert '<span class="not-matching">not matching</span> †' in page
    assert cli.main(["leaderboard", str(run), "--out", str(tmp_path / "site")]) == 0
    assert "not matching</span> †" in (tmp_path / "site" / "index.html").read_text()


def test_a_frontier_that_rests_on_a_doubtful_verdict_is_marked():
    from kick.report.html import _frontier_cell

    levels = [(0.1, "matching"), (0.2, "matching"), (0.3, "undecided")]
    assert _frontier_cell(levels, [0.1]) == "20 % † (30 %: undecided)"
    assert _frontier_cell(levels, [0.3]) == "20 % (30 %: undecided)"


def test_the_places_of_one_run_are_those_of_its_report(run, tmp_path):
    known = read_results(run).places
    write_leaderboard([run], tmp_path / "site")
    rows = json.loads((tmp_path / "site" / "leaderboard.json").read_text())
    assert {row["setting"]: row["place"] for row in rows if row["place"]} == known
    assert "n 97, 3 left out" in (tmp_path / "site" / "index.html").read_text()


def test_other_prompts_than_the_dense_models_are_said(tmp_path):
    """Of a model with a smaller context, say, that had fewer examples in front of some questions."""
    run = write_run(tmp_path / "run", SETTINGS[:3], ["factoid_qa"])
    folder = run / "evaluations" / "magnitude@0.5" / "factoid_qa"
    change_samples(folder, lambda row: row | {"prompt": "Without examples."}, start=90)
    results = read_results(run)
    assert results.get("magnitude@0.5", "factoid_qa").asked_otherwise == 10
    assert results.get("magnitude@0.2", "factoid_qa").asked_otherwise == 0
    write_report(run)
    assert "10 questions had another prompt than dense" in (run / "report.html").read_text()


def test_runs_with_other_numbers_of_examples_are_not_compared(tmp_path):
    runs = [write_run(tmp_path / name, SETTINGS[:2], ["factoid_qa"]) for name in ("one", "other")]

    def had(run, shots):
        path = run / "evaluations" / "dense" / "factoid_qa" / "scores.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"shots": shots}))

    for run in runs:
        document = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(document | {"model": document["model"] | {"name": run.name}}))
    had(runs[0], {"5": 100})
    had(runs[1], {"5": 97, "4": 3})  # a few that another tokenizer makes too long
    write_leaderboard(runs, tmp_path / "site")
    had(runs[1], {"5": 60, "3": 40})
    with pytest.raises(RunError, match="asked 'factoid_qa' differently: shots is"):
        write_leaderboard(runs, tmp_path / "site")


def test_texts_that_were_only_read_are_no_answers_that_changed(tmp_path, capsys):
    run = write_run(tmp_path / "run", SETTINGS[:3], ["perplexity"])
    assert cli.main(["compare", str(run), "dense", "magnitude@0.5", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["suites"]
    assert found["retained"] < 1
    assert found["flipped"] == []


def test_of_graded_answers_those_that_differ_most_are_shown_first(tmp_path, capsys):
    run = write_run(tmp_path / "run", SETTINGS[:3], ["summarization"])
    folder = run / "evaluations" / "magnitude@0.5" / "summarization"
    change_samples(folder, lambda row: row | {"scores": row["scores"] | {"rougeL": 0.9}}, start=99)
    assert cli.main(["compare", str(run), "dense", "magnitude@0.5", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["suites"]
    assert [row["id"] for row in found["flipped"]][:1] == ["s99"]
    assert found["flipped"][0]["difference"] == pytest.approx(0.9)
    assert found["flipped"][1]["difference"] == pytest.approx(-0.3)
    assert cli.main(["compare", str(run), "dense", "magnitude@0.5", "--show", "1"]) == 0
    assert "those that differ most:" in capsys.readouterr().out


def test_chains_with_other_later_stages_are_other_lines():
    def family(*later):
        stages = tuple(Stage(compressor="rtn", level=level) for level in later)
        return SettingResult(Setting(compressor="wanda", level="0.5", then=stages), None, None, {}).family

    assert [family(), family("8"), family("2")] == ["wanda", "wanda > rtn@8", "wanda > rtn@2"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "bfloat16"}, "was computed in bfloat16"),
        (
            {"suites": {"factoid_qa": {"source": "x", "params": {"shots": 1}, "questions": 100, "data": "d"}}},
            "params is",
        ),
        ({"suites": {"factoid_qa": {"source": "x", "params": {}, "questions": 100, "data": "e"}}}, "data is 'e'"),
        (
            {"model": {"name": "<b>model</b>", "kind": "directory", "note": "", "fingerprint": "e" * 64}},
            "'<b>model</b>' is one model in",
        ),
        ({}, "magnitude@0.2 of <b>model</b> is in"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, capsys, change, says):
    first = write_run(tmp_path / "first", SETTINGS[:2], ["factoid_qa"])
    second = write_run(tmp_path / "second", SETTINGS[:2] if not change else SETTINGS[:1], ["factoid_qa"])
    run = json.loads((second / "run.json").read_text())
    (second / "run.json").write_text(json.dumps(run | change))
    assert cli.main(["leaderboard", str(first), str(second), "--out", str(tmp_path / "site")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


# For other tools


def test_results_as_lm_eval_writes_them(run, tmp_path):
    assert cli.main(["report", str(run), "--out", str(tmp_path / "out"), "--lm-eval", str(tmp_path / "lm")]) == 0
    found = json.loads((tmp_path / "lm" / "magnitude@0.5" / "results.json").read_text())
    own = found["results"]["factoid_qa"]
    assert own["contains,none"] == pytest.approx(20 / 97)
    p = 20 / 97
    assert own["contains_stderr,none"] == pytest.approx((p * (1 - p) / 96) ** 0.5)  # with n - 1, as lm-eval has it
    assert found["results"]["perplexity"]["perplexity_stderr,none"] == "N/A"
    assert found["higher_is_better"]["factoid_qa"]["contains"] is True
    assert found["n-samples"]["factoid_qa"] == {"original": 100, "effective": 97}
    assert found["results"]["factoid_qa:topic"]["alias"] == "factoid_qa:topic"


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed(run, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["report", str(run), "--out", str(tmp_path), "--figures", "size-*", "--log-to", name]) == 2
    assert f"pip install 'llm-kick[{name}]'" in capsys.readouterr().err


def test_mlflow_gets_every_setting(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    from kick.report.trackers import log_to

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "tracked").as_uri())
    assert log_to("mlflow", read_results(run), run) == 5
    rows = mlflow.search_runs(search_all_experiments=True, output_format="list")
    by_name = {row.data.params["setting"]: row.data.metrics for row in rows}
    assert by_name["magnitude@0.5"]["factoid_qa/contains"] == pytest.approx(20 / 97)
    assert by_name["magnitude@0.5"]["sparsity"] == 0.5


def test_wandb_gets_every_setting(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from kick.report.trackers import log_to

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert log_to("wandb", read_results(run), run) == 5
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 5


def test_what_cannot_be_read_is_said_and_counts_as_failed(tmp_path, capsys):
    root = write_run(tmp_path / "run", SETTINGS[:3], ["factoid_qa", "perplexity"])
    with open(root / "evaluations" / "magnitude@0.2" / "factoid_qa" / "samples.jsonl", "a") as file:
        file.write("{}\n")
    assert cli.main(["report", str(root)]) == 1
    assert "magnitude@0.2 on factoid_qa: its samples are not the ones" in capsys.readouterr().err
    (root / "evaluations" / "magnitude@0.5" / "perplexity" / "scores.json").write_text("{}")
    (root / "evaluations" / "magnitude@0.5" / "kick.json").write_text("{}")
    assert cli.main(["report", str(root)]) == 1
    assert (root / "report.html").is_file()


def test_figures_that_a_run_has_not_leave_nothing_behind(run, tmp_path, capsys):
    assert cli.main(["report", str(run), "--out", str(tmp_path / "out"), "--figures", "nope-*"]) == 2
    assert not (tmp_path / "out").exists()


def test_answers_in_smaller_batches_are_told(tmp_path):
    root = write_run(tmp_path / "run", SETTINGS[:3], ["factoid_qa"])
    for name, size in (("dense", 128), ("magnitude@0.2", 128), ("magnitude@0.5", 64)):
        path = root / "evaluations" / name / "factoid_qa" / "scores.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"batch_size": size}))
    write_report(root)
    page = (root / "report.html").read_text(encoding="utf-8")
    assert page.count("asked in batches of 64, dense in 128: the smaller after a failure") == 1
