"""The same works on a Ray cluster and as Slurm jobs: what comes out is what one process gives."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kick import cli
from kick.errors import ConfigError, RunError
from kick.progress import Silent
from kick.sweep.clock import Clock, Lane
from kick.sweep.plan import make_plan
from kick.sweep.run import run
from kick.sweep.store import Store
from kick.sweep.work import Work
from kick.sweep_file import load, parse

SWEEP = """
model: {model}
data: embedded
settings: [magnitude@0.3, magnitude@0.5]
suites:
  - {{suite: mmlu, params: {{shots: 0, format: cloze}}, limit: 12}}
  - {{suite: perplexity, params: {{window_bytes: 512}}, limit: 4}}
lm: {{batch_size: 4}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model):
    path = tmp_path_factory.mktemp("clusters") / "sweep.yaml"
    path.write_text(SWEEP.format(model=tiny_model))
    return path


@pytest.fixture(scope="module")
def scores(config):
    """scores.csv of one process."""
    out = config.parent / "inline"
    assert cli.main(["sweep", str(config), "--out", str(out)]) == 0
    return (out / "scores.csv").read_bytes()


def carry_out(config, out, executor):
    plan = make_plan(load(config, [f"executor={executor}"]))
    with Store.open(out, plan) as store:
        summary = run(plan, store, Silent())
    from kick.report import tables
    from kick.report.results import read_results

    return summary, tables.scores_csv(read_results(out)).encode()


@pytest.mark.parametrize(
    ("executor", "asked", "device"),
    [
        ("{name: slurm}", "cuda", "cuda"),
        ("{name: slurm, params: {gpus_per_node: 1}}", "auto", "cuda"),
        ("{name: slurm, params: {gpus_per_node: 0}}", "auto", "cpu"),
        ("{name: slurm, params: {slurm_gres: 'gpu:a100:2'}}", "auto", "cuda"),
        ("{name: slurm, params: {slurm_additional_parameters: {gpus-per-task: 1}}}", "auto", "cuda"),
        ("{name: ray, params: {num_gpus: 1}}", "auto", "cuda"),
        ("{name: ray, params: {num_gpus: 1}}", "cpu", "cpu"),
    ],
)
def test_a_sweep_is_planned_for_what_its_works_are_given(config, executor, asked, device):
    plan = make_plan(load(config, [f"executor={executor}", f"device={asked}"]))
    assert (plan.device, plan.dtype) == (device, "float32" if device == "cpu" else "bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpus_that_are_elsewhere(config, tmp_path, capsys):
    asked = ["sweep", str(config), "--out", str(tmp_path / "run"), "--dry-run", "--set", "device=cuda"]
    assert cli.main([*asked, "--executor", "slurm"]) == 0
    assert "there is no cuda on this machine: times are those of an A100" in capsys.readouterr().out
    assert cli.main(asked) == 2
    assert "device 'cuda' cannot be used" in capsys.readouterr().err


def test_another_kind_of_machine_comes_to_the_same_plan(config, monkeypatch):
    plans = load(config, ["settings=[wanda@0.5, {compressor: wanda, levels: [0.3], seeds: [1]}]"])
    able = {"amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    plan = make_plan(plans)
    sent = plan.decided.model_dump(mode="json")
    able["amx_bf16"] = False
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert make_plan(plans).identity != plan.identity
    assert make_plan(parse(sent, "the job")).identity == plan.identity


@pytest.mark.parametrize(
    "grid",
    [
        "{compressor: COMPRESSOR, levels: [LEVEL], seeds: [0, 1]}",
        "{compressor: COMPRESSOR, levels: [LEVEL], calibration: {samples: 2}}",
        "{compressor: COMPRESSOR, levels: [LEVEL], vary: {calibration.samples: [2, 3]}}",
    ],
)
@pytest.mark.parametrize(("compressor", "level"), [("magnitude", "0.5"), ("rtn", "4"), ("wanda", "0.5")])
def test_whatever_a_grid_calibrates_on_a_worker_comes_to_the_same_plan(config, grid, compressor, level):
    """Also where the compressor needs no calibration at all."""
    plan = make_plan(load(config, [f"settings=[{grid.replace('COMPRESSOR', compressor).replace('LEVEL', level)}]"]))
    assert make_plan(parse(plan.decided.model_dump(mode="json"), "the job")).identity == plan.identity


# Ray


@pytest.fixture(scope="module")
def ray():
    return pytest.importorskip("ray")


@pytest.fixture
def cluster(ray):
    """Two nodes on this machine: a head that runs nothing, and one that works."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_ray_gives_what_one_process_gives(config, scores, cluster, tmp_path):
    summary, found = carry_out(config, tmp_path / "run", "{name: ray, params: {num_cpus: 1}}")
    assert (summary.done, summary.failed) == (6, {})
    assert found == scores


def test_a_node_that_dies_costs_what_it_was_at(config, scores, cluster, tmp_path, monkeypatch):
    """The first node is killed while it works; one that joins then does the rest."""
    out = tmp_path / "run"
    killed = kill_a_node(cluster, monkeypatch, lambda: list(out.glob("evaluations/*/*/samples.jsonl")))
    summary, found = carry_out(config, out, "{name: ray, params: {num_cpus: 1}}")
    assert killed
    assert (summary.done, summary.failed) == (6, {})
    assert found == scores


def test_a_node_that_dies_far_from_the_run_directory_costs_no_more(config, cluster, tmp_path, monkeypatch):
    """What it answered before came back at once: nobody asks for it again."""
    from kick.sweep.executors import ray as rays

    slow = "{suite: summarization, params: {max_new_tokens: 1000}, limit: 2}"  # seconds, to be killed in
    path, out = tmp_path / "sweep.yaml", tmp_path / "run"
    text = config.read_text().replace("{suite: perplexity, params: {window_bytes: 512}, limit: 4}", slow)
    path.write_text(text.replace("[magnitude@0.3, magnitude@0.5]", "[magnitude@0.3]"))
    _, undisturbed = carry_out(path, tmp_path / "inline", "{name: inline}")
    monkeypatch.setattr(rays, "leave_mark", lambda root: "a mark that no node finds")
    killed = kill_a_node(cluster, monkeypatch, lambda: list(out.glob("evaluations/magnitude@0.3/*/scores.json")))
    asked = []
    submit = rays.Ray.submit

    def submit_and_note(self, work):
        asked.append((work.setting, [name for name, _ in work.owed]))
        submit(self, work)

    monkeypatch.setattr(rays.Ray, "submit", submit_and_note)
    summary, found = carry_out(path, out, "{name: ray, workers: 1, params: {num_cpus: 1}}")
    assert killed == [["mmlu"]]
    assert asked[1:] == [("magnitude@0.3", ["mmlu", "summarization"]), ("magnitude@0.3", ["summarization"])]
    assert (summary.done, summary.failed) == (4, {})
    assert found == undisturbed
    assert not (out / "checkpoints").exists() or not list((out / "checkpoints").iterdir())


def kill_a_node(cluster, monkeypatch, when):
    """Kill the node that works once `when` gives files, and have another join; gives the suites that these are of."""
    from kick.sweep.executors.ray import Ray

    first = [node for node in cluster.list_all_nodes() if node != cluster.head_node]
    wait, killed = Ray.wait, []

    def wait_and_kill(self, seconds):
        if first and (files := when()):
            cluster.remove_node(first.pop(), allow_graceful=False)
            cluster.add_node(num_cpus=1)
            killed.append([path.parent.name for path in files])
        return wait(self, 0.05 if first else seconds)

    monkeypatch.setattr(Ray, "wait", wait_and_kill)
    return killed


def test_results_come_back_as_bytes_where_the_run_directory_is_not_seen(config, scores, tmp_path, monkeypatch):
    """As on a machine without the file system: the mark that is asked for is not the one that lies there."""
    from kick.sweep import workshop
    from kick.sweep.executors import elsewhere
    from kick.sweep.executors.base import Job
    from kick.sweep.executors.elsewhere import carry_out_here
    from kick.sweep.work import Owed, Work

    made, compress = [], workshop.compress

    def compress_and_note(recipe, *more):
        made.append(recipe.setting.name)
        return compress(recipe, *more)

    monkeypatch.setattr(workshop, "compress", compress_and_note)
    plan = make_plan(load(config))
    out = tmp_path / "run"
    with Store.open(out, plan) as store:
        job = Job(str(tmp_path / "unseen"), plan.config.model_dump(mode="json"), [], plan.identity)
        for setting in plan.settings:
            work = Work(setting.name, (Owed("mmlu"), Owed("perplexity")))
            found = carry_out_here(job.to_json(), work.to_json(), "a mark")
            for came, suite in zip(found, ("mmlu", "perplexity"), strict=True):
                assert (came.suite, came.fatal) == (suite, None)
                assert {Path(name).parts[0] for name in came.files} == {"evaluations"}
                assert came.take(store) is None
                assert store.evaluation(setting.name, suite).result()["status"] == "complete"
                assert store.record(setting.name) is not None
        assert Counter(made) == dict.fromkeys(("dense", "magnitude@0.3", "magnitude@0.5"), 1)  # dense by the first
        (folder,) = (Path(kept.name) for kept in elsewhere._folders.values())
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["dense"]
    from kick.report import tables
    from kick.report.results import read_results

    assert tables.scores_csv(read_results(out)).encode() == scores


def test_what_comes_back_stays_in_the_run_directory(tmp_path):
    from kick.errors import RunError
    from kick.sweep.executors.elsewhere import Came

    for name in ("../outside", "run.json", "evaluations/../run.json"):
        with pytest.raises(RunError, match="came back under the name"):
            Came({name: b"x"}).take(Store(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_other_weights_than_those_that_answered_before_are_not_taken(tmp_path):
    from kick.sweep.executors.elsewhere import Came

    def came(weights, text):
        record = json.dumps({"weights_fingerprint": weights}).encode()
        return Came({"evaluations/s/kick.json": record, "evaluations/s/mmlu/samples.jsonl": text})

    store = Store(tmp_path)
    assert came("a", b"first").take(store) is None
    assert came("a", b"second").take(store) is None
    assert "its weights came out different" in came("b", b"third").take(store)
    assert (tmp_path / "evaluations/s/mmlu/samples.jsonl").read_bytes() == b"second"


def test_a_refusal_is_not_told_as_a_death(config, tmp_path, monkeypatch):
    from kick.sweep import run as running
    from kick.sweep.executors.base import Ended
    from kick.sweep.executors.inline import Inline

    class Refusing(Inline):
        def submit(self, work):
            if work.setting == "magnitude@0.5":
                self._ended = Ended(work, refused="other weights")
            else:
                super().submit(work)

    monkeypatch.setattr(running, "find_executor", lambda spec: Refusing)
    summary, _ = carry_out(config, tmp_path / "run", "{name: inline, retries: 1}")
    assert summary.done == 4
    assert summary.failed == {
        f"magnitude@0.5 on {suite}": "other weights (2 times)" for suite in ("mmlu", "perplexity")
    }


def test_how_far_lms_are_apart_comes_back_too(tmp_path):
    from kick.sweep.executors.elsewhere import Came

    (tmp_path / "run.json").write_text("{}")
    store = Store(tmp_path)
    assert Came({}, parity=[{"lm": "server", "largest": 0.1}]).take(store) is None
    assert Came({}, parity=[{"lm": "server", "largest": 0.2}]).take(store) is None
    assert store.parity() == [{"lm": "server", "largest": 0.1}]


def test_a_process_that_would_do_something_else_is_refused(config, tmp_path):
    from kick.sweep.executors.base import Job
    from kick.sweep.executors.elsewhere import carry_out_here
    from kick.sweep.work import Owed, Work

    plan = make_plan(load(config))
    identity = {**plan.identity, "versions": {**plan.identity["versions"], "torch": "0.1"}}
    job = Job(str(tmp_path), plan.config.model_dump(mode="json"), [], identity)
    (came,) = carry_out_here(job.to_json(), Work("dense", (Owed("mmlu"),)).to_json(), "a mark")
    assert came.fatal is not None
    assert "versions.torch is '0.1' there" in came.fatal[0]


@pytest.mark.parametrize(
    ("executor", "says"),
    [
        ("{name: local, params: {cpus: 1}}", "'local' takes no params"),
        ("{name: ray, params: {cpus: 1}}", "unknown key 'cpus'"),
        ("{name: slurm, params: {cluster: local, cores: 8}}", "executor 'slurm'"),
        ("{name: slurm, params: {cluster: cloud}}", "'cloud' is none of slurm"),
        ("{name: slurm, params: {timeout_min: an hour}}", "executor 'slurm'.*an hour"),
        ("{name: slurm, params: {slurm_cores: 8}}", "Unknown argument 'cores'"),
    ],
)
def test_wrong_parameters_are_one_clear_error_before_anything_is_begun(config, executor, says):
    if "slurm" in executor:
        pytest.importorskip("submitit")
    with pytest.raises(ConfigError, match=says):
        make_plan(load(config, [f"executor={executor}"]))


# Slurm


def test_submitit_gives_what_one_process_gives(config, scores, tmp_path):
    pytest.importorskip("submitit")
    executor = "{name: slurm, workers: 1, params: {cluster: local, timeout_min: 10}}"
    summary, found = carry_out(config, tmp_path / "run", executor)
    assert (summary.done, summary.failed) == (6, {})
    assert found == scores
    assert list((tmp_path / "run" / "slurm").iterdir())


def test_a_job_that_slurm_does_not_take_waits_for_another_to_end(config, tmp_path, monkeypatch):
    """A controller that is busy, or a limit of jobs at a time."""
    pytest.importorskip("submitit")
    from kick.sweep.executors import slurm
    from kick.sweep.executors.base import Job

    monkeypatch.setattr(slurm, "_PAUSES", (0.0, 0.0))
    plan = make_plan(load(config, ["executor={name: slurm, params: {cluster: local}}"]))
    with Store.open(tmp_path / "run", plan) as store:
        job = Job(str(store.root), plan.config.model_dump(mode="json"), [], plan.identity)
        executor = slurm.Slurm(plan, store, job, unwatched)
        asked = []

        def submit(*arguments):
            asked.append(arguments)
            raise RuntimeError("sbatch: error: QOSMaxSubmitJobPerUserLimit")

        monkeypatch.setattr(executor._executor, "submit", submit)
        with pytest.raises(RunError, match="Slurm takes no job: sbatch: error: QOSMax"):
            executor.submit(Work("dense", ()))
        assert len(asked) == 3
        executor._waiting.clear()
        running = SimpleNamespace(done=lambda: False, exception=lambda: None, result=list)
        executor._jobs.append((running, Work("dense", ()), unwatched()))
        for setting in ("magnitude@0.3", "magnitude@0.5"):
            executor.submit(Work(setting, ()))
        assert (len(asked), executor.wait(0)) == (4, [])  # the second waits behind the first
        running.done = lambda: True
        monkeypatch.setattr(executor._executor, "submit", lambda *arguments: running)
        assert [ended.work.setting for ended in executor.wait(0)] == ["dense"]
        ended = executor.wait(0)
        assert [(each.work.setting, each.died) for each in ended] == [("magnitude@0.3", None), ("magnitude@0.5", None)]


def unwatched():
    return Lane(Clock(Silent(), {}))


def test_the_script_that_slurm_gets(config, tmp_path, monkeypatch):
    """sbatch is replaced by a script that keeps what it is given and says what Slurm says."""
    pytest.importorskip("submitit")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/given.sh\necho "Submitted batch job 17"\n')
    for name in ("srun", "squeue", "sacct", "scancel"):
        (tools / name).write_text("#!/bin/sh\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    params = "{slurm_partition: gpu, gpus_per_node: 1, cpus_per_task: 8, mem_gb: 64, timeout_min: 90}"
    plan = make_plan(load(config, [f"executor={{name: slurm, params: {params}}}"]))
    from kick.sweep.executors.base import Job
    from kick.sweep.executors.slurm import Slurm

    with Store.open(tmp_path / "run", plan) as store:
        job = Job(str(store.root), plan.config.model_dump(mode="json"), [], plan.identity)
        executor = Slurm(plan, store, job, lambda: None)
        executor.submit(Work("dense", ()))
    script = (tmp_path / "given.sh").read_text()
    for line in ("partition=gpu", "gpus-per-node=1", "cpus-per-task=8", "mem=64GB", "time=90"):
        assert f"#SBATCH --{line}" in script
    assert sys.executable in script
    done = subprocess.run(["sh", "-n", tmp_path / "given.sh"], capture_output=True)
    assert done.returncode == 0
