"""Judging at an endpoint that fails, replies nonsense, refuses or is interrupted."""

import threading
import time
from collections import Counter

import pytest
from judge_server import CUT, NOT_JSON, REFUSAL, Fault, JudgeServer, slow, status
from judged_run import SWEEP, good, judgments, rows, spec

from kick import cli
from kick.errors import KickError
from kick.judge.run import judge_run
from kick.progress import Silent

pytestmark = pytest.mark.usefixtures("no_waiting")


def test_faults_that_pass_are_retried_and_nothing_answered_is_asked_again(answered_run, no_waiting):
    faults = [status(429, retry_after="7"), status(500), CUT, NOT_JSON, slow(1.0, '{"rating": 6}')]

    def script(prompt, attempt):
        fault = faults[sum(map(ord, prompt)) % len(faults)]
        return fault if attempt == 1 else good(prompt)

    with JudgeServer(script) as server:
        outcome = judge_run(answered_run, spec(server, timeout=0.4), Silent())
        assert set(server.answered.values()) == {1}
        assert all(count == 2 for count in server.asked.values())
    assert outcome.failed == {}
    assert outcome.record["last_call"]["retried_requests"] == len(server.asked)
    assert 7.0 in no_waiting  # as long as the endpoint asked for
    assert all(wait <= 60 for wait in no_waiting)


def test_what_never_succeeds_is_counted_and_never_a_number(answered_run):
    def script(prompt, attempt):
        if "assistant B" in prompt:
            return REFUSAL
        if "Summary to grade" in prompt:
            return '{"coherence": 6, "consistency": 11, "fluency": 6, "relevance": 6}'  # out of range
        return status(503)

    lucky = []  # one question is answered: where none is, nothing is written

    def once(prompt, attempt):
        if not lucky and "assistant B" not in prompt and "Summary to grade" not in prompt:
            lucky.append(prompt)
        return good(prompt) if prompt in lucky else script(prompt, attempt)

    with JudgeServer(once) as server:
        outcome = judge_run(answered_run, spec(server, retries=1, asks=3), Silent())
    reasons = Counter()
    for setting in ("dense", "magnitude@0.5"):
        for suite in ("mt_bench", "summarization"):
            reasons.update(j["failed"] for j in judgments(answered_run, setting, suite))
            for judgment in judgments(answered_run, setting, suite):
                assert (judgment["answer"] is None) == (judgment["failed"] is not None)
    assert reasons["HTTP 503, 2 times"] > 0
    assert reasons["refused: I will not judge that."] > 0
    assert reasons["unreadable, asked 3 times"] > 0
    assert sum(outcome.failed.values()) == sum(count for reason, count in reasons.items() if reason)
    found = rows(answered_run, "summarization", "quality")["dense"]
    assert (int(found["n"]), int(found["failed"]), found["score"]) == (0, 3, "")


def test_failed_questions_are_asked_again_by_the_same_command(answered_run):
    with JudgeServer(lambda prompt, _: good(prompt) if "assistant B" in prompt else "no idea") as server:
        assert sum(judge_run(answered_run, spec(server, asks=1), Silent()).failed.values()) > 0
        server.script = good
        assert judge_run(answered_run, spec(server, asks=1), Silent()).failed == {}


def test_an_unreadable_reply_is_shown_to_the_judge_again(answered_run):
    with JudgeServer(lambda prompt, attempt: "I think it is good" if attempt == 1 else good(prompt)) as server:
        judge_run(answered_run, spec(server), Silent())
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
def test_an_endpoint_without_schemas_is_asked_plainly_and_that_is_said(answered_run, wrong):
    with JudgeServer(good, understands_schemas=False, wrong=wrong) as server:
        outcome = judge_run(answered_run, spec(server), Silent())
    assert outcome.failed == {}
    assert outcome.record["last_call"]["not_understood_by_the_endpoint"] == ["structured output"]


def test_azures_version_and_key(answered_run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "azure-key")
    with JudgeServer(good) as server:
        arguments = ["judge", str(answered_run), "--judge", "scripted", "--base-url", server.url]
        assert cli.main([*arguments, "--param", "query.api-version=2024-10-21"]) == 0
    assert server.paths == {"/v1/chat/completions?api-version=2024-10-21"}
    assert server.azure_keys == {"azure-key"}


def test_a_missing_file_of_verdicts_is_said_before_anything_is_asked(answered_run):
    with JudgeServer(good) as server, pytest.raises(KickError, match="no file of verdicts"):
        judge_run(answered_run, spec(server, verdicts="nowhere.jsonl"), Silent())
    assert not server.asked


def test_the_key_comes_from_the_environment_and_appears_nowhere(answered_run, monkeypatch, capfd):
    monkeypatch.setenv("MY_JUDGE_KEY", "sk-very-secret-123")
    echoes = [status(400, "bad key sk-very-secret-123"), "sk-very-secret-123", status(500, "sk-very-secret-123")]

    def script(prompt, attempt):
        return echoes[sum(map(ord, prompt)) % 3] if attempt == 1 else good(prompt)

    with JudgeServer(script) as s:
        code = cli.main(
            ["judge", str(answered_run), "--judge", "scripted", "--base-url", s.url, "--param", "key_env=MY_JUDGE_KEY"]
        )
    assert code == 1  # what was answered with 400 has no judgment
    assert s.keys == {"Bearer sk-very-secret-123"}
    printed = capfd.readouterr()
    assert "sk-very" not in printed.out + printed.err
    assert not any(b"sk-very" in file.read_bytes() for file in answered_run.rglob("*") if file.is_file())


def test_a_killed_run_goes_on_where_it_was(answered_run):
    with JudgeServer(good) as server:
        judge_run(answered_run, spec(server), Silent())
        cache = answered_run / "judge-cache.jsonl"
        lines = cache.read_bytes().split(b"\n")
        cache.write_bytes(b"\n".join(lines[:5]) + b"\n" + lines[5][:40])  # as after a kill: half a line at the end
        before = Counter(server.asked)
        outcome = judge_run(answered_run, spec(server), Silent())
        assert outcome.cached == 5
        assert sum((server.asked - before).values()) == len(before) - 5
        assert judge_run(answered_run, spec(server), Silent()).asked == 0


def test_an_early_end_waits_for_no_retries(answered_run, monkeypatch):
    monkeypatch.undo()  # waits are real here
    with JudgeServer(lambda prompt, _: status(503, retry_after="300") if "assistant B" in prompt else status(401)) as s:
        start = time.monotonic()
        with pytest.raises(KickError, match="does not accept the key"):
            judge_run(answered_run, spec(s, concurrency=16, suites={"mt_bench": {"kinds": ["pair"]}}), Silent())
        assert any("assistant B" in prompt for prompt in s.asked)
        assert time.monotonic() - start < 60  # and not the 300 seconds that the others were asked to wait


def test_no_more_questions_under_way_than_asked_for(answered_run):
    with JudgeServer(lambda prompt, _: slow(0.05, good(prompt))) as server:
        judge_run(answered_run, spec(server, concurrency=3), Silent())
    assert server.most_under_way == 3


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
def test_what_cannot_be_judged_is_said_at_once(answered_run, capsys, monkeypatch, options, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert cli.main(["judge", str(answered_run), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (answered_run / "judge.json").exists()


@pytest.mark.parametrize(("code", "message"), [(401, "does not accept the key"), (404, "knows no model 'scripted'")])
def test_an_endpoint_that_can_never_answer_ends_it(answered_run, capsys, code, message):
    with JudgeServer(lambda prompt, _: status(code, "sorry")) as server:
        assert cli.main(["judge", str(answered_run), "--judge", "scripted", "--base-url", server.url]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "body",
    [b"[]", b"null", b"{}", b'{"choices": {}}', b'{"choices": [{}]}', b'{"choices": [{"message": {"content": [1]}}]}'],
)
def test_replies_that_are_no_completions_are_counted_and_end_nothing(answered_run, body):
    broken = Fault(lambda server, request: server.send_json(request, 200, None, raw=body))
    with JudgeServer(lambda prompt, _: broken if "Summary to grade" in prompt else good(prompt)) as server:
        outcome = judge_run(answered_run, spec(server, retries=0), Silent())
    assert sum(outcome.failed.values()) == 6  # three summaries of two models
    assert len(outcome.failed) == 1


def test_what_was_under_way_when_an_error_ends_it_is_kept(answered_run):
    def script(prompt, attempt):
        return slow(0.3, good(prompt)) if "Conversation" in prompt else status(401)

    with JudgeServer(script) as server:
        with pytest.raises(KickError, match="does not accept the key"):
            judge_run(answered_run, spec(server, concurrency=64), Silent())
        answered = Counter(server.asked)
        server.script = good
        judge_run(answered_run, spec(server), Silent())
    assert all(count == 1 for prompt, count in server.asked.items() if "Conversation" in prompt)
    assert any("Conversation" in prompt for prompt in answered)


def test_a_judge_that_fails_at_the_end_of_a_sweep_costs_no_report(tmp_path, roomy_model, capsys):
    with JudgeServer(lambda prompt, _: status(404)) as server:
        text = SWEEP.format(model=roomy_model) + f"judge: {{model: scripted, base_url: '{server.url}'}}\n"
        (tmp_path / "sweep.yaml").write_text(text)
        assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 1
    assert "The judge could not grade" in capsys.readouterr().out
    assert (tmp_path / "run/report.html").is_file()


def test_an_endpoint_that_is_not_there_leaves_a_run_as_it_was(answered_run, capsys):
    before = {path: path.read_bytes() for path in answered_run.rglob("*") if path.is_file()}
    command = [
        "judge",
        str(answered_run),
        "--judge",
        "x",
        "--base-url",
        "http://127.0.0.1:9/v1",
        "--param",
        "retries=0",
    ]
    for _ in range(2):
        assert cli.main(command) == 2
        assert "x answered none of " in capsys.readouterr().err
    for path, content in before.items():
        if path.name != ".lock":
            assert path.read_bytes() == content, path
    assert not (answered_run / "judge.json").exists()
    assert not list(answered_run.rglob("judgments.jsonl"))


def test_a_judge_that_answers_nothing_does_not_take_the_place_of_one_that_did(answered_run, capsys):
    def graded(name, url):
        return cli.main(["judge", str(answered_run), "--judge", name, "--base-url", url, "--param", "retries=0"])

    with JudgeServer(good) as server:
        assert graded("scripted", server.url) == 0
    kept = {
        path: path.read_bytes()
        for path in (answered_run / "judge.json", *answered_run.rglob("judgments.jsonl"), answered_run / "scores.csv")
    }
    assert len(kept) > 3
    with JudgeServer(lambda prompt, _: status(500, "sorry")) as server:
        assert graded("another", server.url) == 2
    assert "another answered none of " in (said := capsys.readouterr().err)
    assert "Most often: " in said
    assert {path: path.read_bytes() for path in kept} == kept
