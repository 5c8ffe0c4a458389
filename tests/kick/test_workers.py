"""Worker processes: what is lost when one of them, or the process that started them, comes to a bad end."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from processes import is_running

from kick.sweep import work
from kick.sweep.executors.base import Job
from kick.sweep.executors.local import Local
from kick.sweep.plan import make_plan
from kick.sweep.store import Store
from kick.sweep_file import load

SWEEP = """
model: {model}
data: embedded
settings: [magnitude@0.3, magnitude@0.5]
suites:
  - {{suite: mmlu, params: {{shots: 0, format: cloze}}, limit: 16}}
  - {{suite: perplexity, params: {{window_bytes: 512}}, limit: 4}}
lm: {{batch_size: 4}}
executor: {{name: local, workers: 1}}
"""

PLUGIN = """
import os, signal, time
from pathlib import Path
from kick_compressors.magnitude import Magnitude as Base
from kick_tasks.perplexity import Perplexity

MARKS = Path({marks!r})

def first_times(what, n):
    '''Whether this is one of the first n calls in any process.'''
    count = len(list(MARKS.glob(what + "*")))
    (MARKS / f"{{what}}{{count}}").touch()
    return count < n

class Troubled(Perplexity):
    name = "troubled"
    def answer(self, lm, examples):
        {trouble}
        yield from super().answer(lm, examples)
"""


MOST_ANSWERS = 40  # of the 48 that the sweep gives: after so many it is still at work


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model):
    path = tmp_path_factory.mktemp("workers") / "sweep.yaml"
    path.write_text(SWEEP.format(model=tiny_model))
    return path


@pytest.fixture(scope="module")
def undisturbed(config):
    """The same in one process."""
    out = config.parent / "undisturbed"
    code, _, err = finish(kick("sweep", config, "--out", out, "--executor", "inline"))
    assert code == 0, err
    return out


def kick(*arguments, threads=1):
    environment = {key: value for key, value in os.environ.items() if key != "KICK_EXECUTOR"}
    environment["OMP_NUM_THREADS"] = str(threads)  # one: the same rounding everywhere, and no waiting for each other
    return subprocess.Popen(
        [sys.executable, "-m", "kick.cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it for jobs in the background
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def same_answers(out, undisturbed):
    assert (out / "scores.csv").read_bytes() == (undisturbed / "scores.csv").read_bytes()
    for path in undisturbed.glob("evaluations/*/*/samples.jsonl"):
        assert (out / path.relative_to(undisturbed)).read_bytes() == path.read_bytes()


def troubled(tmp_path, config, trouble, changes=""):
    """A sweep file with one more suite, whose plugin makes `trouble`."""
    marks = tmp_path / "marks"
    marks.mkdir()
    plugin = tmp_path / "troubled.py"
    plugin.write_text(PLUGIN.format(marks=str(marks), trouble=textwrap.indent(trouble, " " * 8).strip()))
    text = config.read_text().replace("settings: [magnitude@0.3, magnitude@0.5]", "settings: [magnitude@0.5]")
    text = text.replace("lm:", "  - {suite: troubled, params: {window_bytes: 512}, limit: 4}\nlm:")
    path = tmp_path / "troubled.yaml"
    path.write_text(text.replace("executor: {", "executor: {" + changes))
    return ["sweep", path, "--out", tmp_path / "run", "--plugin", plugin]


def test_workers_give_what_one_process_gives(config, undisturbed, tmp_path):
    code, _, err = finish(kick("sweep", config, "--out", tmp_path / "run", "--set", "executor.workers=2"))
    assert code == 0, err
    same_answers(tmp_path / "run", undisturbed)
    assert "magnitude@0.5: mmlu" in err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("seed", range(int(os.environ.get("KICK_TEST_KILLS", "2"))))
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_kill_at_any_moment(config, undisturbed, tmp_path, victim, seed):
    """A worker that is killed is replaced; a parent that is killed takes its workers along, and can be called again."""
    out = tmp_path / "run"
    process = kick("sweep", config, "--out", out, "--set", "executor.workers=2")
    chance = random.Random(seed)
    answers = chance.randrange(MOST_ANSWERS)
    wait_until(lambda: worker_of(process.pid) is not None and answered(out) >= answers, process)
    time.sleep(chance.uniform(0, 0.2))  # not always just after an answer
    assert process.poll() is None
    worker = worker_of(process.pid)
    os.kill(process.pid if victim == "parent" or worker is None else worker, signal.SIGKILL)
    code, _, err = finish(process)
    if victim == "parent":
        code, _, err = finish(kick("sweep", config, "--out", out))
    assert code == 0, err
    same_answers(out, undisturbed)


def answered(out):
    """How many answers are on disk."""
    return sum(path.read_bytes().count(b"\n") for path in out.glob("evaluations/*/*/samples.jsonl"))


def worker_of(pid):
    """The first child of a process that is a worker."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for child in children.read_text().split() if children.exists() else []:
        command = Path(f"/proc/{child}/cmdline")
        if command.exists() and b"kick.sweep.executors.worker" in command.read_bytes():
            return int(child)
    return None


def wait_until(true, process, seconds=60):
    give_up = time.monotonic() + seconds
    while not true() and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.02)


def test_workers_end_with_the_process_that_started_them(config, tmp_path):
    process = kick("sweep", config, "--out", tmp_path / "run")
    wait_until(lambda: worker_of(process.pid) is not None, process)
    worker = worker_of(process.pid)
    process.kill()
    process.communicate()
    give_up = time.monotonic() + 30
    while is_running(worker) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not is_running(worker)


def test_what_kills_its_worker_is_tried_again_with_smaller_batches(config, tmp_path):
    command = troubled(tmp_path, config, "if first_times('call', 1): os.kill(os.getpid(), signal.SIGKILL)")
    code, _, err = finish(kick(*command))
    assert code == 0, err
    assert "trying again: dense on troubled: it was killed (signal 9)" in err
    scores = json.loads((tmp_path / "run/evaluations/dense/troubled/scores.json").read_text())
    assert (scores["status"], scores["batch_size"], scores["n"]) == ("complete", 2, 4)
    other = json.loads((tmp_path / "run/evaluations/dense/mmlu/scores.json").read_text())
    assert other["batch_size"] == 4


def test_what_always_kills_its_worker_costs_itself_only(config, tmp_path):
    command = troubled(tmp_path, config, "os.kill(os.getpid(), signal.SIGKILL)", "retries: 1, ")
    code, _, err = finish(kick(*command))
    assert code == 1, err
    for setting in ("dense", "magnitude@0.5"):
        scores = json.loads((tmp_path / f"run/evaluations/{setting}/troubled/scores.json").read_text())
        assert scores["reason"].startswith("its process died (2 times): it was killed (signal 9)")
        for suite in ("mmlu", "perplexity"):
            own = json.loads((tmp_path / f"run/evaluations/{setting}/{suite}/scores.json").read_text())
            assert own["status"] == "complete"
    assert "failed: dense on troubled" in err


def test_what_kills_the_worker_of_a_variant_of_dense_costs_itself_only(config, tmp_path):
    """A variant has no checkpoint of its own, by which it would be seen that one was made."""
    command = troubled(tmp_path, config, "os.kill(os.getpid(), signal.SIGKILL)", "retries: 0, ")
    variant = "settings: [{compressor: dense, params: {dtype: float32}, label: again}]"
    text = command[1].read_text().replace("settings: [magnitude@0.5]", variant)
    later = "  - {suite: perplexity, label: later, params: {window_bytes: 512}, limit: 4}\n"
    command[1].write_text(text.replace("lm:", later + "lm:"))
    code, _, err = finish(kick(*command))
    assert code == 1, err
    scores = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.glob("run/evaluations/again/*/scores.json")}
    assert {name for name, own in scores.items() if own["status"] == "failed"} == {"troubled"}
    assert set(scores) == {"mmlu", "perplexity", "troubled", "later"}


@pytest.mark.parametrize(("given", "workers", "each"), [(3, 1, 3), (6, 2, 3), (1, 2, 1)])
def test_workers_share_the_threads_that_this_process_may_use(config, tmp_path, given, workers, each):
    """OMP_NUM_THREADS is obeyed, whatever the number of cores."""
    plan = make_plan(load(config, [f"executor.workers={workers}"]))
    before = torch.get_num_threads()
    torch.set_num_threads(given)
    try:
        with Store.open(tmp_path / "run", plan) as store:
            Local(plan, store, Job(str(store.root), {}, [], {}), lambda: None).close()
    finally:
        torch.set_num_threads(before)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["threads"] == each


def test_all_who_work_on_a_run_have_the_same_number_of_threads(config, tmp_path):
    out = tmp_path / "run"
    code, _, err = finish(kick("sweep", config, "--out", out, "--set", "executor.workers=64"))
    assert code == 0, err
    assert json.loads((out / "run.json").read_text())["threads"] == 1
    (out / "evaluations" / "dense" / "mmlu" / "scores.json").unlink()
    (out / "evaluations" / "dense" / "mmlu" / "samples.jsonl").unlink()
    code, _, err = finish(kick("sweep", config, "--out", out, threads=2))
    assert code == 0, err
    assert json.loads((out / "evaluations" / "dense" / "mmlu" / "scores.json").read_text())["lm"]["threads"] == 1


def test_without_a_limit_a_timer_of_somebody_else_goes_on(monkeypatch):
    """In a debugger or under pytest, whose own timer is the same one."""
    calls = []
    monkeypatch.setattr(work.faulthandler, "cancel_dump_traceback_later", lambda: calls.append("cancel"))
    monkeypatch.setattr(work.faulthandler, "dump_traceback_later", lambda *_, **__: calls.append("start"))
    with work._limited(work.Rules()):
        pass
    with work._limited(work.Rules(timeout=5)):  # nobody starts it again: no log
        pass
    assert calls == []
    with work._limited(work.Rules(timeout=5, log=sys.stderr)):
        pass
    assert calls == ["start", "cancel"]


def test_what_hangs_is_ended_by_the_timeout(config, tmp_path):
    command = troubled(tmp_path, config, "time.sleep(3600)", "retries: 0, timeout: 15, ")
    code, _, err = finish(kick(*command))
    assert code == 1, err
    scores = json.loads((tmp_path / "run/evaluations/dense/troubled/scores.json").read_text())
    assert "it took longer than the timeout of 15 s" in scores["reason"]


SLOW = """
import time
from kick_compressors.magnitude import Magnitude

class Slow(Magnitude):
    name = "slow"
    def compress(self, model, level, calibration, progress):
        for step in range(4):
            time.sleep({pause})
            progress(step, 4, "a step")
        return super().compress(model, level, calibration, progress=progress)
"""


@pytest.mark.parametrize(("pause", "goes_on"), [(4, True), (3600, False)])
def test_a_compression_may_take_longer_than_the_timeout_as_long_as_it_moves(config, tmp_path, pause, goes_on):
    (tmp_path / "slow.py").write_text(SLOW.format(pause=pause))
    sweep = config.read_text().replace("[magnitude@0.3, magnitude@0.5]", "[slow@0.5]")
    (tmp_path / "sweep.yaml").write_text(sweep.replace("workers: 1", "workers: 1, retries: 0, timeout: 10"))
    command = ["sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "run", "--plugin", tmp_path / "slow.py"]
    code, _, err = finish(kick(*command))
    assert code == (0 if goes_on else 1), err
    scores = json.loads((tmp_path / "run/evaluations/slow@0.5/mmlu/scores.json").read_text())
    assert scores["status"] == ("complete" if goes_on else "failed")
    assert goes_on or "it took longer than the timeout of 10 s" in scores["reason"]


KILLED_ONCE = """
import os, signal
from pathlib import Path
from kick_compressors.magnitude import Magnitude

class Killed(Magnitude):
    name = "killed"
    def compress(self, model, level, calibration, progress):
        mark = Path({mark!r})
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compress(model, level, calibration, progress=progress)
"""


def test_a_process_that_dies_while_it_compresses_is_no_reason_for_smaller_batches(config, tmp_path):
    """As when a cluster takes a node away: nothing was asked yet."""
    (tmp_path / "killed.py").write_text(KILLED_ONCE.format(mark=str(tmp_path / "mark")))
    sweep = config.read_text().replace("[magnitude@0.3, magnitude@0.5]", "[killed@0.5]")
    (tmp_path / "sweep.yaml").write_text(sweep)
    command = ["sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "run", "--plugin", tmp_path / "killed.py"]
    code, _, err = finish(kick(*command))
    assert code == 0, err
    assert "trying again: killed@0.5: it was killed (signal 9)" in err
    sizes = {json.loads(p.read_text())["batch_size"] for p in tmp_path.glob("run/evaluations/*/mmlu/scores.json")}
    assert len(sizes) == 1


def test_what_runs_out_of_memory_is_tried_again_with_smaller_batches(config, tmp_path):
    trouble = "if len(examples) > 1: raise MemoryError('too many')"
    code, _, err = finish(kick(*troubled(tmp_path, config, trouble)))
    assert code == 0, err
    scores = json.loads((tmp_path / "run/evaluations/dense/troubled/scores.json").read_text())
    assert (scores["status"], scores["batch_size"]) == ("complete", 1)


def test_a_gpu_that_an_error_left_useless_costs_one_try(config, tmp_path):
    """As after an illegal access: whatever the process does next would fail, so it ends and another one goes on."""
    trouble = """
        if first_times("lost", 1):
            from kick.sweep import work
            work._still_computes = lambda device: False
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
    """
    code, _, err = finish(kick(*troubled(tmp_path, config, textwrap.dedent(trouble))))
    assert code == 0, err
    assert "trying again: dense on troubled: it ended with exit code 1" in err


def test_what_eats_all_memory_costs_itself_only(config, tmp_path):
    trouble = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\nhoard = bytearray(8 << 30)"
    code, _, err = finish(kick(*troubled(tmp_path, config, trouble, "retries: 1, ")))
    assert code == 1, err
    scores = json.loads((tmp_path / "run/evaluations/dense/troubled/scores.json").read_text())
    assert (scores["status"], scores["reason"]) == ("failed", "MemoryError: ")


def test_interrupting_ends_workers_and_the_same_command_goes_on(config, undisturbed, tmp_path):
    out = tmp_path / "run"
    process = kick("sweep", config, "--out", out)
    wait_until(lambda: list(out.glob("evaluations/*/*/samples.jsonl")), process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "Run the same command again" in err
    code, _, err = finish(kick("sweep", config, "--out", out))
    assert code == 0, err
    same_answers(out, undisturbed)


def test_two_sweeps_on_one_folder(config, tmp_path):
    command = troubled(tmp_path, config, "time.sleep(3600)")
    first = kick(*command)
    wait_until(lambda: (tmp_path / "run" / "run.json").exists(), first)
    code, _, err = finish(kick(*command))
    first.kill()
    first.communicate()
    assert code == 2
    assert f"is being written by process {first.pid} on " in err


def test_the_lock_outlives_its_owner_while_workers_write(config, tmp_path):
    """Whoever comes after a killed parent waits until the last worker is gone."""
    from kick.errors import RunError
    from kick.sweep import lock as locks

    held = tmp_path / ".lock"
    script = (
        "import fcntl, subprocess, sys, json, os, socket\n"
        f"file = open({str(held)!r}, 'a+')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "owner = {'process': os.getpid(), 'host': socket.gethostname(), 'since': '2026-01-01T00:00:00+00:00'}\n"
        "file.write(json.dumps(owner))\n"
        "file.flush()\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3)'], pass_fds=[file.fileno()])\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    begin = time.monotonic()
    with locks.lock(tmp_path):
        assert time.monotonic() - begin > 1
    with locks.lock(tmp_path), pytest.raises(RunError, match=r"process \d+ on .* since .*Z?"), locks.lock(tmp_path):
        pass


def test_a_clock_that_was_set_back(tmp_path):
    from kick.sweep.lock import Owner

    assert "(" not in str(Owner(1, "here", "2999-01-01T00:00:00+00:00"))
    assert "2999" in str(Owner(1, "here", "2999-01-01T00:00:00+00:00"))


def test_a_full_disk_is_one_error_and_nothing_is_lost(config, undisturbed, tmp_path):
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root to mount a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        filler = disk / "filler"
        filler.write_bytes(b"\0" * ((1 << 20) * 17 // 10))  # what is left holds the weights, not all answers
        code, _, err = finish(kick("sweep", config, "--out", disk / "run"))
        assert code == 2, err
        assert "disk" in err
        assert "Traceback" not in err
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        code, _, err = finish(kick("sweep", config, "--out", disk / "run"))
        assert code == 0, err
        same_answers(disk / "run", undisturbed)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
