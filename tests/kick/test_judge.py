"""Judging a run at a scripted endpoint: what is asked, counted and paid, and what happens when it fails."""

import json
import shutil
import threading
import time
from collections import Counter

import pytest
from conftest import make_tiny_llama
from judge_server import CUT, NOT_JSON, REFUSAL, Fault, JudgeServer, slow, status

from kick import cli
from kick.errors import KickError, UnknownNameError
from kick.judge.client import Judge
from kick.judge.run import judge_run
from kick.judge.spec import JudgeSpec
from kick.progress import Silent

SWEEP = """
model: {model}
data: embedded
settings: [magnitude@0.5]
suites:
  - {{suite: mt_bench, params: {{max_new_tokens: 6}}, limit: 3}}
  - {{suite: summarization, params: {{max_new_tokens: 6}}, limit_per_group: 1}}
"""


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory, tokenizer):
    """A tiny model whose context holds the long stories."""
    path = tmp_path_factory.mktemp("models") / "roomy"
    make_tiny_llama(max_position_embeddings=8192).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def answered(tmp_path_factory, roomy_model):
    """A run with the answers of a dense and a pruned tiny model."""
    folder = tmp_path_factory.mktemp("judge")
    (folder / "sweep.yaml").write_text(SWEEP.format(model=roomy_model))
    assert cli.main(["sweep", str(folder / "sweep.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(answered, tmp_path):
    shutil.copytree(answered, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    waits = []
    original = Judge.__init__
    monkeypatch.setattr(Judge, "__init__", lambda self, spec, budget: original(self, spec, budget, waits.append))
    return waits


def good(prompt, attempt=1):
    """A fair judge: a pair is a tie, a rating is 6."""
    if "assistant B" in prompt:
        return '{"winner": "tie"}'
    if "Summary to grade" in prompt:
        return 'Fine. {"coherence": 6, "consistency": 6, "fluency": 6, "relevance": 6}'
    return '{"rating": 6}'


def spec(server, **changes):
    return JudgeSpec(model="scripted", base_url=server.url, **{"timeout": 5, "concurrency": 4, **changes})


def judgments(run, setting, suite):
    path = run / "evaluations" / setting / suite / "judgments.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(run, suite, metric, group="overall"):
    return {
        row["setting"]: row
        for row in json.loads(cli_json(run))
        if (row["suite"], row["metric"], row["group"]) == (suite, metric, group)
    }


def cli_json(run):
    import csv

    cli.main(["report", str(run)])
    with open(run / "scores.csv") as file:
        return json.dumps(list(csv.DictReader(file)))


def test_what_is_added_to_a_judged_run_is_not_judged_yet(run, answered, capsys):
    with JudgeServer(good) as server:
        judge_run(run, spec(server), Silent())
    longer = ["sweep", str(answered.parent / "sweep.yaml"), "--set", "settings=[magnitude@0.5, magnitude@0.7]"]
    assert cli.main([*longer, "--out", str(run)]) == 0
    assert "2 evaluations are not judged yet, magnitude@0.7 on mt_bench among them" in capsys.readouterr().out
    row = next(line for line in (run / "leaderboard.md").read_text().splitlines() if "magnitude@0.7" in line)
    assert row.count("not judged") == 2
    assert (run / "report.html").read_text().count("not judged") >= 2
    with JudgeServer(good) as server:
        outcome = judge_run(run, spec(server), Silent())
    assert outcome.asked > 0
    cli.main(["report", str(run)])
    assert "not judged" not in (run / "leaderboard.md").read_text()


def test_the_first_judged_suite_may_be_added_with_its_judge(answered, tmp_path, capsys):
    sweep = ["sweep", str(answered.parent / "sweep.yaml"), "--out", str(tmp_path / "run")]
    facts = "{suite: factoid_qa, limit: 2}"
    assert cli.main([*sweep, "--set", f"suites=[{facts}]"]) == 0
    more = ["--set", f"suites=[{facts}, {{suite: mt_bench, params: {{max_new_tokens: 6}}, limit: 1}}]"]
    judged = ["--set", "judge={model: x, base_url: http://localhost:1/v1, suites: {mt_bench: {kinds: [single]}}}"]
    assert cli.main([*sweep, *more, *judged, "--dry-run"]) == 0
    assert "judge" in capsys.readouterr().out


def test_every_answer_is_graded_and_reported(run):
    with JudgeServer(good) as server:
        outcome = judge_run(run, spec(server), Silent())
    # 3 conversations x 2 turns: dense 6 ratings; pruned 6 ratings and 6 pairs in both orders; 3 summaries each
    assert outcome.asked + outcome.record["by_rule"] == outcome.record["judgments"] == 6 + 12 + 6 + 12 + 3 + 3
    assert outcome.failed == {}
    found = rows(run, "mt_bench", "rating")
    asked = [j for j in judgments(run, "magnitude@0.5", "mt_bench") if j["kind"] == "single"]
    expected = sum(j["answer"]["rating"] for j in asked) / len(asked)
    assert float(found["magnitude@0.5"]["score"]) == pytest.approx(expected)
    assert float(rows(run, "mt_bench", "win_rate")["dense"]["score"]) == 0.5  # its own answers: ties without asking
    assert float(rows(run, "summarization", "quality", "large")["dense"]["score"]) == 6.0
    assert "scripted-2026-01 (fp_1)" in (run / "report.html").read_text()
    scores = json.loads((run / "evaluations/dense/mt_bench/scores.json").read_text())
    assert {"rating", "win_rate"} <= {row["metric"] for row in scores["scores"]}


def test_dense_is_never_compared_with_itself_and_empty_answers_need_no_judge(run):
    path = run / "evaluations/magnitude@0.5/mt_bench/samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    dense = (run / "evaluations/dense/mt_bench/samples.jsonl").read_text().splitlines()
    lines[0]["output"], lines[1]["output"] = "", json.loads(dense[1])["output"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rescore(run, "magnitude@0.5", "mt_bench")
    with JudgeServer(good) as server:
        judge_run(run, spec(server), Silent())
    by_id = {j["id"]: j for j in judgments(run, "magnitude@0.5", "mt_bench")}
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


def test_a_judge_that_prefers_what_it_sees_first_sees_only_ties(run):
    with JudgeServer(lambda prompt, _: '{"winner": "A"}' if "assistant B" in prompt else good(prompt)) as server:
        outcome = judge_run(run, spec(server), Silent())
    assert float(rows(run, "mt_bench", "win_rate")["magnitude@0.5"]["score"]) == 0.5
    table = outcome.record["calibration"]["mt_bench"]
    assert table["swap_disagreement"] == 1.0
    assert table["first_shown_wins_when_they_disagree"] == 1.0


def test_judging_again_asks_nothing(run):
    with JudgeServer(good) as server:
        judge_run(run, spec(server), Silent())
        before = sum(server.asked.values())
        first = (run / "evaluations/dense/mt_bench/judgments.jsonl").read_bytes()
        outcome = judge_run(run, spec(server), Silent())
        assert sum(server.asked.values()) == before
    assert (outcome.asked, outcome.cached) == (0, before)
    assert (run / "evaluations/dense/mt_bench/judgments.jsonl").read_bytes() == first


def test_another_judge_is_asked_anew(run):
    with JudgeServer(good) as server:
        judge_run(run, spec(server), Silent())
        before = sum(server.asked.values())
        judge_run(run, spec(server, temperature=0.5), Silent())
        assert sum(server.asked.values()) == 2 * before


def test_faults_that_pass_are_retried_and_nothing_answered_is_asked_again(run, no_waiting):
    faults = [status(429, retry_after="7"), status(500), CUT, NOT_JSON, slow(1.0, '{"rating": 6}')]

    def script(prompt, attempt):
        fault = faults[sum(map(ord, prompt)) % len(faults)]
        return fault if attempt == 1 else good(prompt)

    with JudgeServer(script) as server:
        outcome = judge_run(run, spec(server, timeout=0.4), Silent())
        assert set(server.answered.values()) == {1}
        assert all(count == 2 for count in server.asked.values())
    assert outcome.failed == {}
    assert outcome.record["last_call"]["retried_requests"] == len(server.asked)
    assert 7.0 in no_waiting  # as long as the endpoint asked for
    assert all(wait <= 60 for wait in no_waiting)


def test_what_never_succeeds_is_counted_and_never_a_number(run):
    def script(prompt, attempt):
        if "assistant B" in prompt:
            return REFUSAL
        if "Summary to grade" in prompt:
            return '{"coherence": 6, "consistency": 11, "fluency": 6, "relevance": 6}'  # out of range
        return status(503)

    with JudgeServer(script) as server:
        outcome = judge_run(run, spec(server, retries=1, asks=3), Silent())
    reasons = Counter()
    for setting in ("dense", "magnitude@0.5"):
        for suite in ("mt_bench", "summarization"):
            reasons.update(j["failed"] for j in judgments(run, setting, suite))
            for judgment in judgments(run, setting, suite):
                assert (judgment["answer"] is None) == (judgment["failed"] is not None)
    assert reasons["HTTP 503, 2 times"] > 0
    assert reasons["refused: I will not judge that."] > 0
    assert reasons["unreadable, asked 3 times"] > 0
    assert sum(outcome.failed.values()) == sum(count for reason, count in reasons.items() if reason)
    found = rows(run, "summarization", "quality")["dense"]
    assert (int(found["n"]), int(found["failed"]), found["score"]) == (0, 3, "")


def test_failed_questions_are_asked_again_by_the_same_command(run):
    with JudgeServer(lambda prompt, _: "no idea") as server:
        assert sum(judge_run(run, spec(server, asks=1), Silent()).failed.values()) > 0
        server.script = good
        assert judge_run(run, spec(server, asks=1), Silent()).failed == {}


def test_an_unreadable_reply_is_shown_to_the_judge_again(run):
    with JudgeServer(lambda prompt, attempt: "I think it is good" if attempt == 1 else good(prompt)) as server:
        judge_run(run, spec(server), Silent())
    second = next(body for body in server.bodies if len(body["messages"]) == 4)
    assert second["messages"][2] == {"role": "assistant", "content": "I think it is good"}
    assert "could not be read" in second["messages"][3]["content"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda text: {"error": {"message": text}},  # as OpenAI words it; as FastAPI does, with what was sent
        lambda text: {"detail": [{"loc": ["body"], "msg": text, "input": {"temperature": 0, "prompt": "Hot?"}}]},
    ],
)
def test_an_endpoint_without_schemas_is_asked_plainly_and_that_is_said(run, wrong):
    with JudgeServer(good, understands_schemas=False, wrong=wrong) as server:
        outcome = judge_run(run, spec(server), Silent())
    assert outcome.failed == {}
    assert outcome.record["last_call"]["not_understood_by_the_endpoint"] == ["structured output"]


def test_the_budget_holds_to_the_cent(run):
    """20 USD per million prompt tokens and 50 per million of reply: a request of 1000 + 200 costs 0.03 USD."""
    prices = {"price_in": 20.0, "price_out": 50.0}
    with JudgeServer(good, usage=(1000, 200)) as server:
        budget = 0.40
        outcome = judge_run(run, spec(server, budget_usd=budget, max_tokens=200, **prices), Silent())
        asked = sum(server.asked.values())
        assert outcome.record["usd"] == pytest.approx(0.03 * asked)
        assert 0 < outcome.record["usd"] <= budget
        assert outcome.stopped.startswith(f"the budget is spent after {asked} of ")
        unasked = outcome.record["judgments"] - outcome.record["by_rule"] - asked
        assert outcome.failed == {"not asked": unasked}
        again = judge_run(run, spec(server, budget_usd=budget, max_tokens=200, **prices), Silent())
        assert again.record["usd"] <= budget  # what was spent before counts
        whole = judge_run(run, spec(server, budget_usd=100, max_tokens=200, **prices), Silent())
        assert whole.failed == {}
        assert set(server.asked.values()) == {1}
    assert whole.record["usd"] == pytest.approx(0.03 * sum(server.asked.values()))


def test_a_budget_counts_what_other_judges_took(run):
    with JudgeServer(good, usage=(1000, 200)) as server:
        for temperature in (0.0, 0.1, 0.2):
            limits = {"budget_tokens": 20_000, "max_tokens": 200, "temperature": temperature}
            judge_run(run, spec(server, **limits), Silent())
        assert 0 < 1200 * sum(server.asked.values()) <= 20_000


def test_what_no_judge_could_grade_is_said_before_the_sweep(tmp_path, roomy_model, capsys):
    with JudgeServer(good) as server:
        judge = f"judge: {{model: scripted, base_url: '{server.url}', suites: {{mt_bench: {{bogus: 1}}}}}}\n"
        (tmp_path / "sweep.yaml").write_text(SWEEP.format(model=roomy_model) + judge)
        assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "bogus" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_azures_version_and_key(run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "azure-key")
    with JudgeServer(good) as server:
        arguments = ["judge", str(run), "--judge", "scripted", "--base-url", server.url]
        assert cli.main([*arguments, "--param", "query.api-version=2024-10-21"]) == 0
    assert server.paths == {"/v1/chat/completions?api-version=2024-10-21"}
    assert server.azure_keys == {"azure-key"}


def test_a_judge_that_gives_everyone_the_lowest_grade_is_no_signal(run):
    lowest = '{"rating": 1, "winner": "tie", "coherence": 1, "consistency": 1, "fluency": 1, "relevance": 1}'
    with JudgeServer(lambda prompt, _: lowest) as server:
        judge_run(run, spec(server), Silent())
    assert rows(run, "mt_bench", "rating")["magnitude@0.5"]["verdict"] == "no signal"


def test_a_missing_file_of_verdicts_is_said_before_anything_is_asked(run):
    with JudgeServer(good) as server, pytest.raises(KickError, match="no file of verdicts"):
        judge_run(run, spec(server, verdicts="nowhere.jsonl"), Silent())
    assert not server.asked


def test_a_budget_in_tokens(run):
    with JudgeServer(good, usage=(1000, 200)) as server:
        outcome = judge_run(run, spec(server, budget_tokens=20_000, max_tokens=200), Silent())
    used = outcome.record["prompt_tokens"] + outcome.record["output_tokens"]
    assert 0 < used <= 20_000
    assert outcome.stopped


def test_requests_whose_fate_is_unknown_count_at_their_worst(run):
    with JudgeServer(lambda prompt, attempt: CUT if attempt == 1 else good(prompt), usage=(10, 10)) as server:
        outcome = judge_run(run, spec(server, budget_tokens=10**7, max_tokens=500), Silent())
    assert outcome.record["output_tokens"] == len(server.asked) * (500 + 10)


def test_the_key_comes_from_the_environment_and_appears_nowhere(run, monkeypatch, capfd):
    monkeypatch.setenv("MY_JUDGE_KEY", "sk-very-secret-123")
    echoes = [status(400, "bad key sk-very-secret-123"), "sk-very-secret-123", status(500, "sk-very-secret-123")]

    def script(prompt, attempt):
        return echoes[sum(map(ord, prompt)) % 3] if attempt == 1 else good(prompt)

    with JudgeServer(script) as s:
        code = cli.main(
            ["judge", str(run), "--judge", "scripted", "--base-url", s.url, "--param", "key_env=MY_JUDGE_KEY"]
        )
    assert code == 1  # what was answered with 400 has no judgment
    assert s.keys == {"Bearer sk-very-secret-123"}
    printed = capfd.readouterr()
    assert "sk-very" not in printed.out + printed.err
    assert not any(b"sk-very" in file.read_bytes() for file in run.rglob("*") if file.is_file())


def test_a_killed_run_goes_on_where_it_was(run):
    with JudgeServer(good) as server:
        judge_run(run, spec(server), Silent())
        cache = run / "judge-cache.jsonl"
        lines = cache.read_bytes().split(b"\n")
        cache.write_bytes(b"\n".join(lines[:5]) + b"\n" + lines[5][:40])  # as after a kill: half a line at the end
        before = Counter(server.asked)
        outcome = judge_run(run, spec(server), Silent())
        assert outcome.cached == 5
        assert sum((server.asked - before).values()) == len(before) - 5
        assert judge_run(run, spec(server), Silent()).asked == 0


def test_an_early_end_waits_for_no_retries(run, monkeypatch):
    monkeypatch.undo()  # waits are real here
    with JudgeServer(lambda prompt, _: status(503, retry_after="300") if "assistant B" in prompt else status(401)) as s:
        start = time.monotonic()
        with pytest.raises(KickError, match="does not accept the key"):
            judge_run(run, spec(s, concurrency=16, suites={"mt_bench": {"kinds": ["pair"]}}), Silent())
        assert any("assistant B" in prompt for prompt in s.asked)
        assert time.monotonic() - start < 60  # and not the 300 seconds that the others were asked to wait


def test_no_more_questions_under_way_than_asked_for(run):
    with JudgeServer(lambda prompt, _: slow(0.05, good(prompt))) as server:
        judge_run(run, spec(server, concurrency=3), Silent())
    assert server.most_under_way == 3


def test_repeats_tell_whether_the_judge_agrees_with_itself(run):
    with JudgeServer(
        lambda prompt, attempt: (
            good(prompt)
            if attempt == 1
            else '{"rating": 8, "winner": "A", "coherence": 8, "consistency": 6, "fluency": 6, "relevance": 6}'
        )
    ) as server:
        outcome = judge_run(run, spec(server, repeats=2, concurrency=1), Silent())
    table = outcome.record["calibration"]["summarization"]
    assert table["asked_again"] == 2
    assert table["same_answer"] == 0.0
    assert table["mean_rating_change"] == pytest.approx(0.5)  # one of four criteria moved by two
    assert float(rows(run, "summarization", "coherence")["dense"]["score"]) == 6.0  # repeats enter no score


def test_reference_verdicts(run, tmp_path):
    with JudgeServer(good) as server:
        judge_run(run, spec(server), Silent())
        first = next(j for j in judgments(run, "dense", "mt_bench") if j["asks"])
        row = {"suite": "mt_bench", "setting": "dense", "id": first["id"], "answer": {"rating": 9}}
        (tmp_path / "people.jsonl").write_text(json.dumps(row) + "\n")
        outcome = judge_run(run, spec(server, verdicts=str(tmp_path / "people.jsonl")), Silent())
    table = outcome.record["calibration"]["mt_bench"]
    assert (table["with_reference_verdict"], table["mean_distance_from_reference"]) == (1, 3.0)


def test_the_other_protocol_rates_both_summaries_in_both_orders(run):
    def script(prompt, attempt):
        if "Summary B" not in prompt:
            return good(prompt)
        return '{"coherence": [8, 6], "consistency": [8, 6], "fluency": [8, 6], "relevance": [8, 6]}'

    with JudgeServer(script) as server:
        judge_run(run, spec(server, suites={"summarization": {"protocol": "both"}}), Silent())
    asked = judgments(run, "dense", "summarization")
    assert Counter(j["order"] for j in asked) == {"ab": 3, "ba": 3}
    assert float(rows(run, "summarization", "quality")["dense"]["score"]) == 7.0  # 8 when shown first, else 6


def test_the_highlights_go_to_the_judge_and_never_to_the_model(run):
    with JudgeServer(good) as server:
        judge_run(run, spec(server), Silent())
    from importlib.resources import files

    stories = files("kick_tasks").joinpath("data/summarization/stories.jsonl").read_text().splitlines()
    highlights = {row["id"]: row["highlights"] for row in map(json.loads, stories)}
    samples = [
        json.loads(line) for line in (run / "evaluations/dense/summarization/samples.jsonl").read_text().splitlines()
    ]
    for sample in samples:
        assert highlights[sample["id"]] not in sample["prompt"]
        assert any(highlights[sample["id"]] in prompt for prompt in server.asked)


def test_ctrl_c_keeps_what_is_paid_for(monkeypatch):
    """Two questions are under way when it comes: both replies are kept, and no further question is asked."""
    from kick.judge import run as judging

    begun, go_on = threading.Barrier(3), threading.Event()

    class Slow:
        asked, stopped = [], False

        def ask(self, question):
            self.asked.append(question)
            begun.wait(10)
            go_on.wait(10)
            return f"reply to {question}"

        def stop(self):
            self.stopped = True

    original = judging.wait
    calls = []

    def interrupted(*args, **options):
        calls.append(None)
        if len(calls) == 1:
            begun.wait(10)
            go_on.set()
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(judging, "wait", interrupted)
    judge, found = Slow(), []
    questions = [judging.Asked("s", "suite", number, f"key {number}") for number in range(5)]

    def take():
        found.extend((asked.key, verdict) for asked, verdict in judging.ask_all(judge, questions, 2))

    with pytest.raises(KeyboardInterrupt):
        take()
    assert sorted(found) == [("key 0", "reply to 0"), ("key 1", "reply to 1")]
    assert sorted(judge.asked) == [0, 1]
    assert judge.stopped


def test_an_estimate_asks_nothing(run, capsys):
    with JudgeServer(good) as server:
        arguments = ["judge", str(run), "--judge", "scripted", "--base-url", server.url, "--price", "2,8", "--dry-run"]
        assert cli.main([*arguments, "--json"]) == 0
        assert not server.asked
    cost = json.loads(capsys.readouterr().out)
    assert cost["to_ask"] == cost["questions"] - cost["settled_by_rule"]
    expected = (cost["estimated_prompt_tokens"] * 2 + cost["estimated_output_tokens"] * 8) / 1e6
    assert cost["estimated_usd"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge", "gpt-x"], "OPENAI_API_KEY is not set"),
        (["--judge", "m", "--base-url", "http://127.0.0.1:9/v1", "--budget", "1"], "without its prices"),
        (["--judge", "m", "--base-url", "http://127.0.0.1:9/v1", "--param", "nonsense=1"], "unknown key 'nonsense'"),
        (["--judge", "m", "--base-url", "http://127.0.0.1:9/v1", "--param", "mmlu.x=1"], "judge.suites names 'mmlu'"),
        (["--judge", "m", "--base-url", "http://127.0.0.1:9/v1", "--param", "mt_bench.x=1"], "unknown key 'x'"),
        (["--judge", "m", "--base-url", "http://127.0.0.1:9/v1", "--price", "cheap"], "not two numbers"),
        (["--judge", "m", "--base-url", "http://me:secret@127.0.0.1:9/v1"], "holds a credential"),
    ],
)
def test_what_cannot_be_judged_is_said_at_once(run, capsys, monkeypatch, options, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert cli.main(["judge", str(run), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "judge.json").exists()


@pytest.mark.parametrize(("code", "message"), [(401, "does not accept the key"), (404, "knows no model 'scripted'")])
def test_an_endpoint_that_can_never_answer_ends_it(run, capsys, code, message):
    with JudgeServer(lambda prompt, _: status(code, "sorry")) as server:
        assert cli.main(["judge", str(run), "--judge", "scripted", "--base-url", server.url]) == 2
    assert message in capsys.readouterr().err


def test_a_judge_in_the_sweep_file(tmp_path, roomy_model, capsys):
    with JudgeServer(good) as server:
        text = SWEEP.format(model=roomy_model) + f"judge: {{model: scripted, base_url: '{server.url}'}}\n"
        (tmp_path / "sweep.yaml").write_text(text)
        assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["unjudged"] == 0
    assert (tmp_path / "run/judge.json").is_file()
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 0  # all from the cache


def test_answers_given_anew_are_judged_anew(run):
    with JudgeServer(good) as server:
        judge_run(run, spec(server), Silent())
        before = Counter(server.asked)
        path = run / "evaluations/dense/summarization/samples.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[0]["output"] = "another summary"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        rescore(run, "dense", "summarization")
        scores = run / "evaluations/dense/summarization/scores.json"
        held = json.loads(scores.read_text())
        del held["judgments_sha256"]  # an evaluation that is answered again writes its scores anew
        scores.write_text(json.dumps(held))
        assert "quality" not in {row["metric"] for row in rows_of_setting(run, "dense")}
        judge_run(run, spec(server), Silent())
        (new,) = (server.asked - before).keys()
        assert "another summary" in new
    assert "quality" in {row["metric"] for row in rows_of_setting(run, "dense")}


@pytest.mark.parametrize(
    "body",
    [b"[]", b"null", b"{}", b'{"choices": {}}', b'{"choices": [{}]}', b'{"choices": [{"message": {"content": [1]}}]}'],
)
def test_replies_that_are_no_completions_are_counted_and_end_nothing(run, body):
    broken = Fault(lambda server, request: server.send_json(request, 200, None, raw=body))
    with JudgeServer(lambda prompt, _: broken if "Summary to grade" in prompt else good(prompt)) as server:
        outcome = judge_run(run, spec(server, retries=0), Silent())
    assert sum(outcome.failed.values()) == 6  # three summaries of two models
    assert len(outcome.failed) == 1


def test_what_was_under_way_when_an_error_ends_it_is_kept(run):
    def script(prompt, attempt):
        return slow(0.3, good(prompt)) if "Conversation" in prompt else status(401)

    with JudgeServer(script) as server:
        with pytest.raises(KickError, match="does not accept the key"):
            judge_run(run, spec(server, concurrency=64), Silent())
        answered = Counter(server.asked)
        server.script = good
        judge_run(run, spec(server), Silent())
    assert all(count == 1 for prompt, count in server.asked.items() if "Conversation" in prompt)
    assert any("Conversation" in prompt for prompt in answered)


def test_another_setting_is_what_answers_are_compared_with(run):
    """The judge prefers whatever dense said: against it the pruned model loses; against the pruned one dense wins."""
    lines = (run / "evaluations" / "dense" / "mt_bench" / "samples.jsonl").read_text().split("\n")
    dense = {row["id"]: row["output"] for row in map(json.loads, filter(None, lines))}

    def prefers_dense(prompt, attempt=1):
        if "assistant B" not in prompt:
            return good(prompt)
        first = prompt.index("Conversation with assistant B")
        said = [text for text in dense.values() if text and text in prompt]
        return json.dumps({"winner": "A" if any(prompt.index(text) < first for text in said) else "B"})

    pruned = next(path.name for path in (run / "evaluations").iterdir() if path.name != "dense")
    with JudgeServer(prefers_dense) as server:
        judge_run(run, spec(server, suites={"mt_bench": {"kinds": ["pair"], "baseline": pruned}}), Silent())
        won = rows(run, "mt_bench", "win_rate")
        assert float(won["dense"]["score"]) > 0.9
        assert float(won[pruned]["score"]) == 0.5  # against itself
        with pytest.raises(UnknownNameError, match="setting to compare with named 'nobody'"):
            judge_run(run, spec(server, suites={"mt_bench": {"baseline": "nobody"}}), Silent())


def test_pairs_alone_are_a_score_of_their_own(run):
    with JudgeServer(good) as server:
        judge_run(run, spec(server, suites={"mt_bench": {"kinds": ["pair"]}}), Silent())
    cli.main(["report", str(run)])
    assert "mt_bench (win_rate)" in (run / "leaderboard.md").read_text()


def test_a_judge_that_fails_at_the_end_of_a_sweep_costs_no_report(tmp_path, roomy_model, capsys):
    with JudgeServer(lambda prompt, _: status(404)) as server:
        text = SWEEP.format(model=roomy_model) + f"judge: {{model: scripted, base_url: '{server.url}'}}\n"
        (tmp_path / "sweep.yaml").write_text(text)
        assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 1
    assert "The judge could not grade" in capsys.readouterr().out
    assert (tmp_path / "run/report.html").is_file()


def rows_of_setting(run, setting):
    return [row for row in json.loads(cli_json(run)) if row["setting"] == setting]


# What a sweep that is judged would ask


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


def test_a_judge_that_answers_nothing_does_not_take_the_place_of_one_that_did(run, capsys):
    def graded(name, url):
        return cli.main(["judge", str(run), "--judge", name, "--base-url", url, "--param", "retries=0"])

    with JudgeServer(good) as server:
        assert graded("scripted", server.url) == 0
    kept = {path: path.read_bytes() for path in (run / "judge.json", *run.rglob("judgments.jsonl"), run / "scores.csv")}
    assert len(kept) > 3
    with JudgeServer(lambda prompt, _: status(500, "sorry")) as server:
        assert graded("another", server.url) == 2
    assert "another answered none of " in (said := capsys.readouterr().err)
    assert "Most often: " in said
    assert {path: path.read_bytes() for path in kept} == kept
