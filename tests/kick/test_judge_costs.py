"""What judging costs: budgets that hold, estimates before anything is asked."""

import json

import pytest
from judge_server import CUT, JudgeServer
from judged_run import SWEEP, good, spec

from kick import cli
from kick.judge.run import judge_run
from kick.progress import Silent

pytestmark = pytest.mark.usefixtures("no_waiting")


def test_the_budget_holds_to_the_cent(answered_run):
    """20 USD per million prompt tokens and 50 per million of reply: a request of 1000 + 200 costs 0.03 USD."""
    prices = {"price_in": 20.0, "price_out": 50.0}
    with JudgeServer(good, usage=(1000, 200)) as server:
        budget = 0.40
        outcome = judge_run(answered_run, spec(server, budget_usd=budget, max_tokens=200, **prices), Silent())
        asked = sum(server.asked.values())
        assert outcome.record["usd"] == pytest.approx(0.03 * asked)
        assert 0 < outcome.record["usd"] <= budget
        assert outcome.stopped.startswith(f"the budget is spent after {asked} of ")
        unasked = outcome.record["judgments"] - outcome.record["by_rule"] - asked
        assert outcome.failed == {"not asked": unasked}
        again = judge_run(answered_run, spec(server, budget_usd=budget, max_tokens=200, **prices), Silent())
        assert again.record["usd"] <= budget  # what was spent before counts
        whole = judge_run(answered_run, spec(server, budget_usd=100, max_tokens=200, **prices), Silent())
        assert whole.failed == {}
        assert set(server.asked.values()) == {1}
    assert whole.record["usd"] == pytest.approx(0.03 * sum(server.asked.values()))


def test_a_budget_counts_what_other_judges_took(answered_run):
    with JudgeServer(good, usage=(1000, 200)) as server:
        for temperature in (0.0, 0.1, 0.2):
            limits = {"budget_tokens": 20_000, "max_tokens": 200, "temperature": temperature}
            judge_run(answered_run, spec(server, **limits), Silent())
        assert 0 < 1200 * sum(server.asked.values()) <= 20_000


def test_what_no_judge_could_grade_is_said_before_the_sweep(tmp_path, roomy_model, capsys):
    with JudgeServer(good) as server:
        judge = f"judge: {{model: scripted, base_url: '{server.url}', suites: {{mt_bench: {{bogus: 1}}}}}}\n"
        (tmp_path / "sweep.yaml").write_text(SWEEP.format(model=roomy_model) + judge)
        assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "bogus" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_budget_in_tokens(answered_run):
    with JudgeServer(good, usage=(1000, 200)) as server:
        outcome = judge_run(answered_run, spec(server, budget_tokens=20_000, max_tokens=200), Silent())
    used = outcome.record["prompt_tokens"] + outcome.record["output_tokens"]
    assert 0 < used <= 20_000
    assert outcome.stopped


def test_requests_whose_fate_is_unknown_count_at_their_worst(answered_run):
    with JudgeServer(lambda prompt, attempt: CUT if attempt == 1 else good(prompt), usage=(10, 10)) as server:
        outcome = judge_run(answered_run, spec(server, budget_tokens=10**7, max_tokens=500), Silent())
    assert outcome.record["output_tokens"] == len(server.asked) * (500 + 10)


def test_an_estimate_asks_nothing(answered_run, capsys):
    with JudgeServer(good) as server:
        arguments = [
            "judge",
            str(answered_run),
            "--judge",
            "scripted",
            "--base-url",
            server.url,
            "--price",
            "2,8",
            "--dry-run",
        ]
        assert cli.main([*arguments, "--json"]) == 0
        assert not server.asked
    cost = json.loads(capsys.readouterr().out)
    assert cost["to_ask"] == cost["questions"] - cost["settled_by_rule"]
    expected = (cost["estimated_prompt_tokens"] * 2 + cost["estimated_output_tokens"] * 8) / 1e6
    assert cost["estimated_usd"] == pytest.approx(expected)


def test_a_plan_knows_how_many_questions_the_judge_will_get(answered, tmp_path, capsys):
    """Six for each conversation (two turns, rated and compared in both orders), of dense two; one a summary."""

    def asked(command, *more):
        assert cli.main([*command, "--dry-run", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    judge = ["--set", "judge={model: scripted, base_url: 'http://localhost:1', price_in: 2, price_out: 8}"]
    sweep = ["sweep", str(answered.parent / "sweep.yaml"), *judge, "--out"]
    whole = asked(["judge", str(answered), "--judge", "scripted", "--base-url", "http://localhost:1"])
    new = asked([*sweep, str(tmp_path / "new")])["judge"]
    assert new["questions"] == 3 * (6 + 2) + 2 * 3
    assert whole["questions"] == new["questions"] + 3 * 2  # and each turn of dense beside itself, a tie in either order
    assert new["tokens"] > 200 * 30
    assert new["estimated_usd"] > 8 * 200 * 30 / 1e6
    # of a run that is there, what no judge has answered
    there = asked([*sweep, str(answered)])["judge"]
    assert there["questions"] == whole["to_ask"]


def test_what_no_judge_can_grade_is_said(answered, capsys):
    sweep = ["sweep", str(answered.parent / "sweep.yaml"), "--out", "unused", "--dry-run", "--set"]
    url = "base_url: 'http://localhost:1'"
    assert cli.main([*sweep, f"judge={{model: scripted, {url}, suites: {{mmlu: {{}}}}}}"]) == 2
    assert "judge.suites names 'mmlu', which no judge can grade" in capsys.readouterr().err
    assert cli.main([*sweep, f"judge={{model: scripted, {url}}}", "--set", "suites=[mmlu]"]) == 2
    assert "none of the suites can be graded" in capsys.readouterr().err
