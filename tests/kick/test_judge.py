"""Judging a run at a scripted endpoint: what is asked, and what becomes of the replies."""

import json
from collections import Counter

import pytest
from judge_server import JudgeServer
from judged_run import SWEEP, all_rows, good, judgments, rows, spec

from kick import cli
from kick.errors import UnknownNameError
from kick.judge.run import judge_run
from kick.progress import Silent

pytestmark = pytest.mark.usefixtures("no_waiting")


def test_what_is_added_to_a_judged_run_is_not_judged_yet(answered_run, answered, capsys):
    with JudgeServer(good) as server:
        judge_run(answered_run, spec(server), Silent())
    longer = ["sweep", str(answered.parent / "sweep.yaml"), "--set", "settings=[magnitude@0.5, magnitude@0.7]"]
    assert cli.main([*longer, "--out", str(answered_run)]) == 0
    assert "2 evaluations are not judged yet, magnitude@0.7 on mt_bench among them" in capsys.readouterr().out
    row = next(line for line in (answered_run / "leaderboard.md").read_text().splitlines() if "magnitude@0.7" in line)
    assert row.count("not judged") == 2
    assert (answered_run / "report.html").read_text().count("not judged") >= 2
    with JudgeServer(good) as server:
        outcome = judge_run(answered_run, spec(server), Silent())
    assert outcome.asked > 0
    cli.main(["report", str(answered_run)])
    assert "not judged" not in (answered_run / "leaderboard.md").read_text()


def test_the_first_judged_suite_may_be_added_with_its_judge(answered, tmp_path, capsys):
    sweep = ["sweep", str(answered.parent / "sweep.yaml"), "--out", str(tmp_path / "run")]
    facts = "{suite: factoid_qa, limit: 2}"
    assert cli.main([*sweep, "--set", f"suites=[{facts}]"]) == 0
    more = ["--set", f"suites=[{facts}, {{suite: mt_bench, params: {{max_new_tokens: 6}}, limit: 1}}]"]
    judged = ["--set", "judge={model: x, base_url: http://localhost:1/v1, suites: {mt_bench: {kinds: [single]}}}"]
    assert cli.main([*sweep, *more, *judged, "--dry-run"]) == 0
    assert "judge" in capsys.readouterr().out


def test_every_answer_is_graded_and_reported(answered_run):
    with JudgeServer(good) as server:
        outcome = judge_run(answered_run, spec(server), Silent())
    # 3 conversations x 2 turns: dense 6 ratings; pruned 6 ratings and 6 pairs in both orders; 3 summaries each
    assert outcome.asked + outcome.record["by_rule"] == outcome.record["judgments"] == 6 + 12 + 6 + 12 + 3 + 3
    assert outcome.failed == {}
    found = rows(answered_run, "mt_bench", "rating")
    asked = [j for j in judgments(answered_run, "magnitude@0.5", "mt_bench") if j["kind"] == "single"]
    expected = sum(j["answer"]["rating"] for j in asked) / len(asked)
    assert float(found["magnitude@0.5"]["score"]) == pytest.approx(expected)
    assert (
        float(rows(answered_run, "mt_bench", "win_rate")["dense"]["score"]) == 0.5
    )  # its own answers: ties without asking
    assert float(rows(answered_run, "summarization", "quality", "large")["dense"]["score"]) == 6.0
    assert "scripted-2026-01 (fp_1)" in (answered_run / "report.html").read_text()
    scores = json.loads((answered_run / "evaluations/dense/mt_bench/scores.json").read_text())
    assert {"rating", "win_rate"} <= {row["metric"] for row in scores["scores"]}


def test_dense_is_never_compared_with_itself_and_empty_answers_need_no_judge(answered_run):
    path = answered_run / "evaluations/magnitude@0.5/mt_bench/samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    dense = (answered_run / "evaluations/dense/mt_bench/samples.jsonl").read_text().splitlines()
    lines[0]["output"], lines[1]["output"] = "", json.loads(dense[1])["output"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rescore(answered_run, "magnitude@0.5", "mt_bench")
    with JudgeServer(good) as server:
        judge_run(answered_run, spec(server), Silent())
    by_id = {j["id"]: j for j in judgments(answered_run, "magnitude@0.5", "mt_bench")}
    empty, equal = lines[0]["id"], lines[1]["id"]
    assert by_id[f"{empty} single"]["answer"] == {"rating": 1.0}
    assert [by_id[f"{empty} pair {order}"]["answer"]["winner"] for order in ("ab", "ba")] == ["B", "A"]  # it loses
    assert by_id[f"{equal} pair ab"]["answer"] == {"winner": "tie"}
    assert by_id[f"{equal} pair ab"]["asks"] == 0
    twice = [p for p in server.asked if "assistant B" in p and p.count(f"\n{lines[1]['output']}\n") >= 2]
    assert lines[1]["output"]
    assert not twice


def rescore(run, setting, suite):
    """Make the changed samples the ones that were scored."""
    from kick.files import sha256_of

    folder = run / "evaluations" / setting / suite
    scores = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").write_text(json.dumps({**scores, "samples_sha256": sha256_of(folder / "samples.jsonl")}))


def test_a_judge_that_prefers_what_it_sees_first_sees_only_ties(answered_run):
    with JudgeServer(lambda prompt, _: '{"winner": "A"}' if "assistant B" in prompt else good(prompt)) as server:
        outcome = judge_run(answered_run, spec(server), Silent())
    assert float(rows(answered_run, "mt_bench", "win_rate")["magnitude@0.5"]["score"]) == 0.5
    table = outcome.record["calibration"]["mt_bench"]
    assert table["swap_disagreement"] == 1.0
    assert table["first_shown_wins_when_they_disagree"] == 1.0


def test_judging_again_asks_nothing(answered_run):
    with JudgeServer(good) as server:
        judge_run(answered_run, spec(server), Silent())
        before = sum(server.asked.values())
        first = (answered_run / "evaluations/dense/mt_bench/judgments.jsonl").read_bytes()
        outcome = judge_run(answered_run, spec(server), Silent())
        assert sum(server.asked.values()) == before
    assert (outcome.asked, outcome.cached) == (0, before)
    assert (answered_run / "evaluations/dense/mt_bench/judgments.jsonl").read_bytes() == first


def test_another_judge_is_asked_anew(answered_run):
    with JudgeServer(good) as server:
        judge_run(answered_run, spec(server), Silent())
        before = sum(server.asked.values())
        judge_run(answered_run, spec(server, temperature=0.5), Silent())
        assert sum(server.asked.values()) == 2 * before


def test_a_judge_that_gives_everyone_the_lowest_grade_is_no_signal(answered_run):
    lowest = '{"rating": 1, "winner": "tie", "coherence": 1, "consistency": 1, "fluency": 1, "relevance": 1}'
    with JudgeServer(lambda prompt, _: lowest) as server:
        judge_run(answered_run, spec(server), Silent())
    assert rows(answered_run, "mt_bench", "rating")["magnitude@0.5"]["verdict"] == "no signal"


def test_repeats_tell_whether_the_judge_agrees_with_itself(answered_run):
    with JudgeServer(
        lambda prompt, attempt: (
            good(prompt)
            if attempt == 1
            else '{"rating": 8, "winner": "A", "coherence": 8, "consistency": 6, "fluency": 6, "relevance": 6}'
        )
    ) as server:
        outcome = judge_run(answered_run, spec(server, repeats=2, concurrency=1), Silent())
    table = outcome.record["calibration"]["summarization"]
    assert table["asked_again"] == 2
    assert table["same_answer"] == 0.0
    assert table["mean_rating_change"] == pytest.approx(0.5)  # one of four criteria moved by two
    assert float(rows(answered_run, "summarization", "coherence")["dense"]["score"]) == 6.0  # repeats enter no score


def test_reference_verdicts(answered_run, tmp_path):
    with JudgeServer(good) as server:
        judge_run(answered_run, spec(server), Silent())
        first = next(j for j in judgments(answered_run, "dense", "mt_bench") if j["asks"])
        row = {"suite": "mt_bench", "setting": "dense", "id": first["id"], "answer": {"rating": 9}}
        (tmp_path / "people.jsonl").write_text(json.dumps(row) + "\n")
        outcome = judge_run(answered_run, spec(server, verdicts=str(tmp_path / "people.jsonl")), Silent())
    table = outcome.record["calibration"]["mt_bench"]
    assert (table["with_reference_verdict"], table["mean_distance_from_reference"]) == (1, 3.0)


def test_the_other_protocol_rates_both_summaries_in_both_orders(answered_run):
    def script(prompt, attempt):
        if "Summary B" not in prompt:
            return good(prompt)
        return '{"coherence": [8, 6], "consistency": [8, 6], "fluency": [8, 6], "relevance": [8, 6]}'

    with JudgeServer(script) as server:
        judge_run(answered_run, spec(server, suites={"summarization": {"protocol": "both"}}), Silent())
    asked = judgments(answered_run, "dense", "summarization")
    assert Counter(j["order"] for j in asked) == {"ab": 3, "ba": 3}
    assert float(rows(answered_run, "summarization", "quality")["dense"]["score"]) == 7.0  # 8 when shown first, else 6


def test_the_highlights_go_to_the_judge_and_never_to_the_model(answered_run):
    with JudgeServer(good) as server:
        judge_run(answered_run, spec(server), Silent())
    from importlib.resources import files

    stories = files("kick_tasks").joinpath("data/summarization/stories.jsonl").read_text().splitlines()
    highlights = {row["id"]: row["highlights"] for row in map(json.loads, stories)}
    samples = [
        json.loads(line)
        for line in (answered_run / "evaluations/dense/summarization/samples.jsonl").read_text().splitlines()
    ]
    for sample in samples:
        assert highlights[sample["id"]] not in sample["prompt"]
        assert any(highlights[sample["id"]] in prompt for prompt in server.asked)


def test_a_judge_in_the_sweep_file(tmp_path, roomy_model, capsys):
    with JudgeServer(good) as server:
        text = SWEEP.format(model=roomy_model) + f"judge: {{model: scripted, base_url: '{server.url}'}}\n"
        (tmp_path / "sweep.yaml").write_text(text)
        assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["unjudged"] == 0
    assert (tmp_path / "run/judge.json").is_file()
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 0  # all from the cache


def test_answers_given_anew_are_judged_anew(answered_run):
    with JudgeServer(good) as server:
        judge_run(answered_run, spec(server), Silent())
        before = Counter(server.asked)
        path = answered_run / "evaluations/dense/summarization/samples.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[0]["output"] = "another summary"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        rescore(answered_run, "dense", "summarization")
        scores = answered_run / "evaluations/dense/summarization/scores.json"
        held = json.loads(scores.read_text())
        del held["judgments_sha256"]  # an evaluation that is answered again writes its scores anew
        scores.write_text(json.dumps(held))
        assert "quality" not in metrics_of_dense(answered_run)
        judge_run(answered_run, spec(server), Silent())
        (new,) = (server.asked - before).keys()
        assert "another summary" in new
    assert "quality" in metrics_of_dense(answered_run)


def test_another_setting_is_what_answers_are_compared_with(answered_run):
    """The judge prefers whatever dense said: against it the pruned model loses; against the pruned one dense wins."""
    lines = (answered_run / "evaluations" / "dense" / "mt_bench" / "samples.jsonl").read_text().split("\n")
    dense = {row["id"]: row["output"] for row in map(json.loads, filter(None, lines))}

    def prefers_dense(prompt, attempt=1):
        if "assistant B" not in prompt:
            return good(prompt)
        first = prompt.index("Conversation with assistant B")
        said = [text for text in dense.values() if text and text in prompt]
        return json.dumps({"winner": "A" if any(prompt.index(text) < first for text in said) else "B"})

    pruned = next(path.name for path in (answered_run / "evaluations").iterdir() if path.name != "dense")
    with JudgeServer(prefers_dense) as server:
        judge_run(answered_run, spec(server, suites={"mt_bench": {"kinds": ["pair"], "baseline": pruned}}), Silent())
        won = rows(answered_run, "mt_bench", "win_rate")
        assert float(won["dense"]["score"]) > 0.9
        assert float(won[pruned]["score"]) == 0.5  # against itself
        with pytest.raises(UnknownNameError, match="setting to compare with named 'nobody'"):
            judge_run(answered_run, spec(server, suites={"mt_bench": {"baseline": "nobody"}}), Silent())


def test_pairs_alone_are_a_score_of_their_own(answered_run):
    with JudgeServer(good) as server:
        judge_run(answered_run, spec(server, suites={"mt_bench": {"kinds": ["pair"]}}), Silent())
    cli.main(["report", str(answered_run)])
    assert "mt_bench (win_rate)" in (answered_run / "leaderboard.md").read_text()


def metrics_of_dense(run):
    return {row["metric"] for row in all_rows(run) if row["setting"] == "dense"}
