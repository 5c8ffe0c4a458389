"""Whole sweeps on the tiny model: what they leave on disk, what survives a kill, and what stops them at once."""

import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import swept

from kick import cli, meter
from kick.progress import Silent
from kick.report import write_report
from kick.sweep.overlap import shared_passage
from kick.sweep.plan import make_plan
from kick.sweep.run import run
from kick.sweep.store import EvaluationStore, Store
from kick.sweep_file import load

SWEEP = """
model: {model}
data: embedded
settings: [magnitude@0.5, "wanda@2:4"]
calibration: {{samples: 2, sequence_length: 32}}
suites:
  - {{suite: factoid_qa, params: {{shots: 2, max_new_tokens: 6}}, limit: 20}}
  - {{suite: mmlu, params: {{shots: 0, format: cloze}}, limit: 24}}
  - {{suite: perplexity, params: {{window_bytes: 512}}, limit: 4}}
lm: {{batch_size: 4}}
"""


@pytest.fixture
def config(tmp_path, tiny_model):
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.format(model=tiny_model))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    """A run that nothing disturbed."""
    return swept(tmp_path_factory.mktemp("sweep"), SWEEP.format(model=tiny_model))


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def kick(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "kick.cli", *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


# What a run leaves


def test_a_run_directory_holds_what_is_promised(finished):
    present = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    for name in ("run.json", "scores.csv", "leaderboard.csv", "leaderboard.md", "report.html"):
        assert name in present
    for setting in ("dense", "magnitude@0.5", "wanda@2:4"):
        assert f"evaluations/{setting}/kick.json" in present
        for suite in ("factoid_qa", "mmlu", "perplexity"):
            assert f"evaluations/{setting}/{suite}/samples.jsonl" in present
            assert f"evaluations/{setting}/{suite}/scores.json" in present
    for figure in ("factoid_qa-against-sparsity", "mmlu-against-sparsity", "perplexity-against-sparsity"):
        assert {f"figures/{figure}.svg", f"figures/{figure}.png"} <= present
    assert not (finished / "checkpoints").exists()  # not asked to keep them


def test_scores_csv_has_the_columns_that_users_script_against(finished):
    header = (finished / "scores.csv").read_text().split("\n")[0]
    assert header == (
        "setting,compressor,level,sparsity,bits_per_weight,suite,metric,group,n,score,ci_low,ci_high,"
        "dense_score,retained,retained_ci_low,retained_ci_high,verdict,p_value,flips,truncated,failed"
    )


def test_scores_are_the_means_of_the_samples(finished):
    compared = 0
    for row in rows(finished / "scores.csv"):
        if row["group"] != "overall" or row["metric"] not in ("contains", "accuracy"):
            continue
        path = finished / "evaluations" / row["setting"] / row["suite"] / "samples.jsonl"
        samples = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        key = {"contains": "contains", "accuracy": "correct"}[row["metric"]]
        compared += 1
        assert int(row["n"]) == len(samples) == (20 if row["suite"] == "factoid_qa" else 24)
        assert float(row["score"]) == pytest.approx(sum(s["scores"][key] for s in samples) / len(samples), rel=1e-5)
    assert compared == 6  # three settings, two suites


def test_every_setting_is_asked_the_same_in_the_same_order(finished):
    for suite in ("factoid_qa", "mmlu", "perplexity"):
        asked = []
        for setting in ("dense", "magnitude@0.5", "wanda@2:4"):
            lines = (
                (finished / "evaluations" / setting / suite / "samples.jsonl").read_text(encoding="utf-8").split("\n")
            )
            asked.append([(json.loads(line)["id"], json.loads(line)["prompt"]) for line in lines if line])
        assert asked[0] == asked[1] == asked[2]


def test_a_sample_has_the_promised_fields(finished):
    line = (finished / "evaluations/dense/factoid_qa/samples.jsonl").read_text(encoding="utf-8").split("\n")[0]
    assert set(json.loads(line)) == {
        "id", "group", "prompt", "output", "choices", "scores", "truncated", "shots", "n_prompt_tokens",
        "n_output_tokens", "error",
    }  # fmt: skip


def test_run_json_says_what_was_run(finished):
    found = json.loads((finished / "run.json").read_text())
    assert {"config", "versions", "hardware", "model", "seeds", "identity"} <= found.keys()
    assert found["dtype"] == "float32"
    assert len(found["model"]["fingerprint"]) == 64


# Resume


def test_a_second_call_asks_nothing(finished, config, capsys):
    assert cli.main(["sweep", str(config), "--out", str(finished), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["evaluations"], document["already_done"], document["done"]) == (9, 9, 0)


def test_two_runs_give_the_same_scores(finished, config, tmp_path):
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/scores.csv").read_bytes() == (finished / "scores.csv").read_bytes()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_killed_sweep_ends_like_an_undisturbed_one(finished, config, tmp_path, seed):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "kick.cli", "sweep", str(config), "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wanted = random.Random(seed).randrange(5, 130)  # samples on disk before the kill
    while process.poll() is None and _samples_on_disk(out) < wanted:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = _samples_on_disk(out)
    assert 0 < before < 144
    complete = set(out.glob("evaluations/*/*/scores.json"))
    assert cli.main(["sweep", str(config), "--out", str(out)]) == 0
    assert (out / "scores.csv").read_bytes() == (finished / "scores.csv").read_bytes()
    others = set(out.glob("evaluations/*/*/scores.json")) - complete
    asked = sum(json.loads(path.read_text())["asked_now"] for path in others)
    assert asked <= 144 - before + 4  # what was missing, and at most the one batch in flight again
    for path in out.glob("evaluations/*/*/samples.jsonl"):
        same = finished / path.relative_to(out)
        assert path.read_bytes() == same.read_bytes()


def _samples_on_disk(out):
    return sum(path.read_bytes().count(b"\n") for path in out.glob("evaluations/*/*/samples.jsonl"))


def test_damaged_samples_are_asked_again(finished, config, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    folder = out / "evaluations" / "magnitude@0.5" / "mmlu"
    whole = (folder / "samples.jsonl").read_bytes()
    lines = whole.split(b"\n")
    (folder / "samples.jsonl").write_bytes(b"\n".join(lines[:10]) + b'\n{"id": "half')
    (out / "scores.csv").unlink()
    assert cli.main(["sweep", str(config), "--out", str(out)]) == 0
    assert (folder / "samples.jsonl").read_bytes() == whole
    assert (out / "scores.csv").read_bytes() == (finished / "scores.csv").read_bytes()
    assert json.loads((folder / "scores.json").read_text())["asked_now"] < 24


def test_resuming_keeps_whole_batches_only(tmp_path):
    from kick.suite import Sample

    store = EvaluationStore(tmp_path)
    batches = [["a", "b"], ["c", "d"]]
    assert store.resume(batches) == 0
    with store.appending() as appender:
        for id in "abc":
            appender.add(Sample(id, "g", "a prompt with \u2028 inside"))
    assert store.resume(batches) == 1
    assert [sample.id for sample in store.samples()] == ["a", "b"]
    with store.appending() as appender:
        appender.add(Sample("x", "g", "not the next question"))
    assert store.resume(batches) == 1
    assert [sample.id for sample in store.samples()] == ["a", "b"]


def test_a_compressor_that_comes_out_different_is_not_mixed_in(finished, config, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    record = out / "evaluations" / "wanda@2:4" / "kick.json"
    changed = json.loads(record.read_text()) | {"weights_fingerprint": "other"}
    record.write_text(json.dumps(changed))
    (out / "evaluations" / "wanda@2:4" / "perplexity" / "scores.json").unlink()
    config.write_text(config.read_text() + "keep_checkpoints: true\n")
    for _ in range(2):  # what was refused once is not taken from the disk the second time
        summary = _run(config, out)
        assert list(summary.failed) == ["wanda@2:4 on perplexity"]
        assert "came out different" in summary.failed["wanda@2:4 on perplexity"]


def _run(config, out):
    plan = make_plan(load(config))
    with Store.open(out, plan) as store:
        return run(plan, store, Silent())


# Failures


def test_a_failing_evaluation_costs_itself_only_and_is_tried_again(config, tmp_path, monkeypatch, capsys):
    from kick_tasks.mmlu import MMLU

    def broken(self, lm, examples):
        raise ZeroDivisionError("planted")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MMLU, "answer", broken)
        assert cli.main(["sweep", str(config), "--out", str(out)]) == 1
    assert "3 of 9 evaluations failed" in capsys.readouterr().out
    reason = json.loads((out / "evaluations/dense/mmlu/scores.json").read_text())
    assert (reason["status"], reason["reason"]) == ("failed", "ZeroDivisionError: planted")
    scores = rows(out / "scores.csv")
    assert [row["n"] for row in scores if row["suite"] == "mmlu"] == ["0"] * 3
    assert any(row["suite"] == "perplexity" and row["setting"] == "wanda@2:4" and row["score"] for row in scores)
    assert cli.main(["sweep", str(config), "--out", str(out)]) == 0
    assert all(row["n"] != "0" for row in rows(out / "scores.csv"))


def test_a_failing_compressor_costs_its_setting_only(config, tmp_path, monkeypatch):
    from kick_compressors.wanda import Wanda

    def broken(self, *arguments, **options):
        raise MemoryError("planted")

    monkeypatch.setattr(Wanda, "solve", broken)
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run")]) == 1
    failed = {row["setting"] for row in rows(tmp_path / "run/scores.csv") if row["n"] == "0"}
    assert failed == {"wanda@2:4"}


# Wrong input: one clear error, exit code 2, nothing written


def bad(config, tmp_path, change, *options):
    text = config.read_text()
    assert change[0] in text
    config.write_text(text.replace(*change))
    return ["sweep", str(config), "--out", str(tmp_path / "out"), *options]


CHANGES = {
    "unknown model": (("model: ", "model: no-model # "), "no model called 'no-model'"),
    "unknown suite": (("suite: mmlu", "suite: mmul"), "Did you mean 'mmlu'"),
    "unknown compressor": (("magnitude@0.5", "magnitud@0.5"), "Did you mean 'magnitude'"),
    "level out of range": (("magnitude@0.5", "magnitude@1.5"), "level '1.5' is not between 0 and 1"),
    "impossible pattern": (("wanda@2:4", "wanda@3:2"), "keeps 3 of every 2 weights"),
    "sparsity and pattern": (("wanda@2:4", "wanda@0.5,2:4"), "a sparsity together with a pattern"),
    "unknown key": (("data:", "daat:"), "unknown key 'daat'"),
    "wrong type": (("batch_size: 4", "batch_size: four"), "lm.batch_size is 'four'"),
    "unknown parameter": (("format: cloze", "from: cloze"), "unknown key 'from'"),
    "wrong parameter": (
        ("format: cloze", "format: essay"),
        "'format': input should be 'letters', 'cloze' or 'generated'",
    ),
    "missing data": (("data: embedded", "data: /nowhere/at/all"), "no data folder /nowhere/at/all"),
    "unknown lm": (("batch_size: 4", "name: slow"), "no lm named 'slow'"),
    "unknown calibration": (("samples: 2", "source: none.txt, samples: 2"), "no text source 'none.txt'"),
    "too little calibration text": (("samples: 2", "samples: 100000"), "tokens; 'embedded' holds"),
    "no suite": (("suites:\n", "suites: []\nother:\n"), "suites is ()"),
    "no device": (("data:", "device: abacus\ndata:"), "device 'abacus' cannot be used"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_bad_input_is_one_clear_error_and_writes_nothing(config, tmp_path, capsys, case):
    change, says = CHANGES[case]
    assert cli.main(bad(config, tmp_path, change)) == 2
    error = capsys.readouterr().err
    assert error.startswith("kick: error: ")
    assert says in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_row_without_an_answer_stops_before_anything_is_written(config, tmp_path, capsys):
    (tmp_path / "FreebaseQA-eval.json").write_text(
        json.dumps({"Questions": [{"Question-ID": "q", "RawQuestion": "Who?", "Parses": []}]})
    )
    change = ("data: embedded", f"data: {tmp_path}")
    config.write_text(config.read_text().replace("shots: 2, ", ""))
    assert cli.main(bad(config, tmp_path, change)) == 2
    assert "question 1 of" in (error := capsys.readouterr().err)
    assert "has no answer" in error
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/kick"):
        assert cli.main(["sweep", str(config), "--out", str(out)]) == 2
        assert "cannot be" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(config, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert cli.main(["sweep", str(config), "--out", str(locked / "run")]) == 2
    assert "no permission" in capsys.readouterr().err


def test_a_folder_of_another_configuration(finished, config, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    config.write_text(config.read_text() + "dtype: bfloat16\n")
    assert cli.main(["sweep", str(config), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "dtype is 'float32' there, 'bfloat16' here" in error
    assert "--fresh" in error
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert cli.main(["sweep", str(config), "--out", str(out), "--fresh"]) == 0
    assert json.loads((out / "run.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_of_something_else(config, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "photos")]) == 2
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "photos"), "--fresh"]) == 2
    assert "is not empty and holds no run.json" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_one_writer_at_a_time(config, tmp_path, capsys):
    plan = make_plan(load(config))
    with Store.open(tmp_path / "run", plan):
        assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run")]) == 2
        assert f"is being written by process {os.getpid()}" in capsys.readouterr().err
        assert cli.main(["report", str(tmp_path / "run")]) == 2
        assert f"is being written by process {os.getpid()}" in capsys.readouterr().err
        assert not (tmp_path / "run" / "scores.csv").exists()
        assert cli.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "elsewhere")]) == 0


def test_a_file_system_without_locks_is_said_to_be_one(config, tmp_path, capsys, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("kick.sweep.lock.fcntl.flock", flock)
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "lies on a file system without file locks" in capsys.readouterr().err


def test_a_run_that_was_killed_before_it_began_may_begin(config, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", ".run.json.host.7.partial"):
        (tmp_path / "run" / name).touch()
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run"), "--set", "executor={name: inline}"]) == 0


def test_what_needs_no_calibration_is_not_estimated_with_one(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kick.sweep.estimate.speed_of", lambda *_: 1e6)

    def seconds(setting, samples):
        changed = [f"settings=[{setting}]", f"calibration={{samples: {samples}, sequence_length: 16}}"]
        sets = [part for change in changed for part in ("--set", change)]
        assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run"), "--dry-run", "--json", *sets]) == 0
        return json.loads(capsys.readouterr().out)["estimated_seconds"]

    assert seconds("magnitude@0.5", 2) == seconds("magnitude@0.5", 200)
    assert seconds("wanda@0.5", 2) < seconds("wanda@0.5", 200)


def test_names_cannot_leave_the_run(config, tmp_path):
    text = config.read_text().replace("suite: mmlu,", "suite: mmlu, label: ../../escaped,")
    config.write_text(text.replace('settings: [magnitude@0.5, "wanda@2:4"]', ""))
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run")]) == 0
    assert not list(tmp_path.glob("escaped*"))
    assert (tmp_path / "run/evaluations/dense/%2E.%2F..%2Fescaped/samples.jsonl").is_file()


# Before running


def test_dry_run_writes_nothing(config, tmp_path, capsys):
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run"), "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["evaluations"] == 9
    assert document["suites"] == {"factoid_qa": 20, "mmlu": 24, "perplexity": 4}
    # two checkpoints at a time, of 600 x 32 embeddings, 2 x 9,216 in the blocks and five norms of 32, in 4 bytes each
    assert document["estimated_disk_bytes"] == 2 * 37_792 * 4 + 3 * 48 * 3000
    assert not (tmp_path / "run").exists()


def test_half_precision_on_a_cpu_without_units_for_it_is_warned_of(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(meter, "product_speed", lambda device, dtype: {"float32": 6e10, "bfloat16": 2e10}[dtype])
    dry = ["sweep", str(config), "--out", str(tmp_path / "run"), "--dry-run", "--set"]
    assert cli.main([*dry, "dtype=bfloat16"]) == 0
    assert "matrix products take 3 times as long in bfloat16 as in float32 on this CPU" in capsys.readouterr().out
    assert cli.main([*dry, "dtype=float32"]) == 0
    assert "times as long" not in capsys.readouterr().out
    assert meter.slow_precision("cuda", "bfloat16") is None
    monkeypatch.setattr(meter, "product_speed", lambda device, dtype: {"float32": 6e10, "bfloat16": 3.3e10}[dtype])
    assert "take 1.8 times as long" in str(meter.slow_precision("cpu", "bfloat16"))
    monkeypatch.setattr(meter, "product_speed", lambda device, dtype: 6e10)
    assert meter.slow_precision("cpu", "bfloat16") is None


def test_a_tracker_that_is_not_installed_is_missed_before_anything_is_run(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run"), "--log-to", "mlflow"]) == 2
    assert "pip install 'llm-kick[mlflow]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_be_reached_costs_no_outcome(finished, config, monkeypatch, capsys):
    class Unreachable:
        @staticmethod
        def set_experiment(name):
            raise ConnectionError("no server at nowhere:5000\nand more")

    monkeypatch.setitem(sys.modules, "mlflow", Unreachable)
    assert cli.main(["sweep", str(config), "--out", str(finished), "--log-to", "mlflow"]) == 1
    said = capsys.readouterr().out
    assert "magnitude@0.5" in said
    assert "mlflow did not take the results: no server at nowhere:5000\n" in said


def test_dry_run_knows_what_is_there(finished, config, capsys):
    assert cli.main(["sweep", str(config), "--out", str(finished), "--dry-run"]) == 0
    assert "9 evaluations, 9 already there, 0 to do" in capsys.readouterr().out


def test_text_that_is_scored_is_not_calibrated_on(config, tmp_path, capsys):
    from importlib.resources import files

    text = files("kick_tasks").joinpath("data/perplexity/text.jsonl")
    changes = [
        "settings=[wanda@0.5]",
        "suites=[{suite: perplexity, params: {window_bytes: 2048}}]",
        f"calibration={{source: '{text}', samples: 8, sequence_length: 256}}",
    ]
    asked = [part for change in changes for part in ("--set", change)]
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run"), *asked]) == 2
    assert "holds a passage that 'perplexity' scores" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["data", "validation"])
def test_text_that_is_scored_is_not_trained_on(config, tmp_path, capsys, key):
    from importlib.resources import files

    text = files("kick_tasks").joinpath("data/perplexity/text.jsonl")
    params = f"{{{key}: '{text}', update_every: {0 if key == 'data' else 5}, steps: 10}}"
    changes = [
        f"settings=[{{compressor: ast, levels: ['2:4'], params: {params}}}]",
        "suites=[{suite: perplexity, params: {window_bytes: 2048}}]",
    ]
    asked = [part for change in changes for part in ("--set", change)]
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run"), *asked]) == 2
    assert "the text that ast trains on holds a passage that 'perplexity' scores" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_passages_of_two_texts():
    words = [f"word{number}" for number in range(200)]
    calibration = " ".join(words)
    assert shared_passage([calibration], ["other " * 40 + " ".join(words[50:113])]) is not None  # 63 in a row
    assert shared_passage([calibration], [" ".join(words[50:81])]) is None  # 31
    assert shared_passage([calibration], [" ".join(reversed(words))]) is None
    assert shared_passage([], [calibration]) is None


def test_interrupting_says_how_to_go_on(config, tmp_path, monkeypatch, capsys):
    from kick_tasks.mmlu import MMLU

    def interrupt(self, lm, examples):
        raise KeyboardInterrupt

    monkeypatch.setattr(MMLU, "answer", interrupt)
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run")]) == 130
    assert "Run the same command again" in capsys.readouterr().err


def test_report_again_gives_the_same_tables(finished, tmp_path):
    write_report(finished, tmp_path)
    for name in ("scores.csv", "leaderboard.csv", "leaderboard.md"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    for figure in (finished / "figures").iterdir():
        assert (tmp_path / "figures" / figure.name).read_bytes() == figure.read_bytes()


# Policies, several models


def test_a_smaller_budget_holds_for_what_was_kept_before(config, tmp_path):
    config.write_text(config.read_text() + "keep_checkpoints: true\nexecutor: {name: inline}\n")
    _run(config, tmp_path / "run")
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3
    config.write_text(config.read_text() + "disk_budget_gb: 0.0003\n")
    _run(config, tmp_path / "run")  # nothing is left to be asked
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("setting", ["{compressor: tune}", "ast@2:4"])
def test_what_cannot_be_streamed_is_said_before_anything_is_run(config, tmp_path, setting, capsys):
    config.write_text(re.sub("settings: .*", f"settings: [{setting}]", config.read_text()) + "stream: true\n")
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run"), "--dry-run"]) == 2
    assert "cannot be streamed" in capsys.readouterr().err


def test_a_suite_that_is_timed_beside_other_works_is_said(config, tmp_path, capsys):
    config.write_text(config.read_text().replace("suites:", "suites:\n  - {suite: speed}", 1))
    for workers, said in ((2, True), (1, False)):
        arguments = ["sweep", str(config), "--out", str(tmp_path / "run"), "--dry-run", "--executor", "local"]
        assert cli.main([*arguments, "--set", f"executor.workers={workers}"]) == 0
        assert ("speed is timed while other works run beside it" in capsys.readouterr().out) == said


def test_kept_checkpoints_stay_within_their_budget(config, tmp_path):
    """A checkpoint of the tiny model takes 37,792 weights of 4 bytes and a tokenizer: the budget holds one of two."""
    config.write_text(config.read_text() + "keep_checkpoints: true\ndisk_budget_gb: 0.0003\nexecutor: {name: inline}\n")
    _run(config, tmp_path / "run")
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"dense", "wanda@2:4"}  # the one that finished first is gone; dense is not counted


def test_disk_for_what_will_be_kept_is_there_before_anything_is_done(config, tmp_path, capsys, monkeypatch):
    """Dense and two others of 151,168 bytes in float32, and what questions take: 3,000 bytes each at most."""
    from collections import namedtuple

    def disk(*more):
        assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run"), "--dry-run", "--json", *more]) == 0
        document = json.loads(capsys.readouterr().out)
        answers = 3 * sum(document["suites"].values()) * 3000
        return (document["estimated_disk_bytes"] - answers) / 151_168

    kept = ("--set", "keep_checkpoints=true")
    assert disk() == pytest.approx(2, abs=0.3)  # dense and one at work
    assert disk(*kept) == pytest.approx(3, abs=0.4)
    assert disk(*kept, "--set", "disk_budget_gb=0.0000001") == pytest.approx(2, abs=0.3)
    assert cli.main(["sweep", str(config), "--out", "unused", "--dry-run", "--set", "disk_budget_gb=1"]) == 2
    assert "set keep_checkpoints: true" in capsys.readouterr().err
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(400_000))
    arguments = ["sweep", str(config), "--out", str(tmp_path / "run"), "--set", "executor={name: inline}"]
    assert cli.main([*arguments, *kept]) == 2
    assert "keep fewer checkpoints (disk_budget_gb)" in capsys.readouterr().err
    assert cli.main(arguments) == 0


def test_checkpoints_of_earlier_calls_count_in_the_budget(config, tmp_path):
    config.write_text(config.read_text() + "keep_checkpoints: true\ndisk_budget_gb: 0.0003\nexecutor: {name: inline}\n")
    _run(config, tmp_path / "run")  # leaves dense and wanda@2:4
    (tmp_path / "run" / "evaluations" / "magnitude@0.5" / "perplexity" / "scores.json").write_text("")  # a torn disk
    _run(config, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"dense", "magnitude@0.5"}
