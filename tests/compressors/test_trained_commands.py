"""Compressors that train, from the command line: killed and resumed, from a sweep file; what they cost and tell."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY
from kick_compressors.ast.compressor import AST
from kick_compressors.sheared.compressor import Sheared
from loopback import free_port
from transformers import LlamaConfig, LlamaForCausalLM

from kick import cli
from kick.levels import Pattern, Shape
from kick.report import write_report

SWEEP = """
model: {model}
data: embedded
settings:
  - wanda@2:4
  - {{compressor: ast, levels: ["2:4"], params: {{steps: 6, batch_size: 4, sequence_length: 32, slorb: 16}}, then: ["rtn@4"]}}
  - {{compressor: llm_pruner, levels: [0.1], params: {{skip_first: 0, skip_last: 0}}, then: [{{compressor: tune, params: {{steps: 6, sequence_length: 32}}}}]}}
  - compressor: sheared
    levels: [1x16x24x2]
    params:
      held_out: 2
      pruning: {{steps: 6, batch_size: 4, sequence_length: 32}}
      continuing: {{steps: 6, batch_size: 4, sequence_length: 32}}
calibration: {{samples: 4, sequence_length: 64}}
suites:
  - {{suite: factoid_qa, params: {{shots: 1, max_new_tokens: 4}}, limit: 6}}
  - {{suite: perplexity, limit: 2}}
executor: {{name: inline}}
"""  # noqa: E501


@pytest.fixture
def sweep(tmp_path, tiny_model):
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(model=tiny_model))
    return tmp_path / "sweep.yaml"


def test_a_sweep_measures_trained_compressors_beside_the_others(sweep, tmp_path, capsys):
    assert cli.main(["sweep", str(sweep), "--out", str(tmp_path / "run")]) == 0
    with open(tmp_path / "run" / "scores.csv") as file:
        rows = {row["setting"]: row for row in csv.DictReader(file) if row["suite"] == "factoid_qa"}
    assert set(rows) == {"dense", "wanda@2:4", "ast@2:4 > rtn@4", "llm_pruner@0.1 > tune", "sheared@1x16x24x2"}
    assert float(rows["ast@2:4 > rtn@4"]["sparsity"]) >= 0.5
    results = write_report(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Trained here" in page
    by_name = {result.name: result for result in results.settings}
    assert [stage["tokens"] for stage in by_name["sheared@1x16x24x2"].training] == [12 * 4 * 32]
    assert by_name["llm_pruner@0.1 > tune"].parameters_removed == pytest.approx(0.1, abs=0.01)
    assert {result.axis for result in results.settings[3:]} == {"size"}
    assert not list((tmp_path / "run").rglob("*.work"))
    assert not (tmp_path / "run" / "checkpoints").is_dir() or not list((tmp_path / "run" / "checkpoints").iterdir())
    drawn = {path.stem for path in (tmp_path / "run" / "figures").glob("training-*.png")}
    assert drawn == {
        "training-ast@2-4 %3E rtn@4-1-ast",
        "training-llm_pruner@0.1 %3E tune-2-tune",
        "training-sheared@1x16x24x2-1-sheared-pruning",
        "training-sheared@1x16x24x2-1-sheared-continuing",
    }


TUNED = """
model: {model}
data: embedded
settings:
  - {{compressor: tune, label: dense-tuned, params: {{data: {pairs}, rank: 0, steps: 4, sequence_length: 48}}}}
  - compressor: magnitude
    label: pruned-tuned
    levels: [0.5]
    then: [{{compressor: tune, params: {{data: {pairs}, rank: 0, steps: 4, sequence_length: 48}}}}]
suites: [{{suite: mt_bench, params: {{max_new_tokens: 6}}, limit: 2}}]
executor: {{name: inline}}
judge: {{model: scripted, base_url: "{url}", suites: {{mt_bench: {{kinds: [pair], baseline: dense-tuned}}}}}}
"""


def test_models_tuned_on_pairs_are_compared_in_both_orders(tokenizer, tmp_path, monkeypatch, capsys):
    """Sheared LLaMA's section 3: a judge that always likes the first answer better has no favourite."""
    from conftest import make_tiny_llama
    from judge_server import JudgeServer

    monkeypatch.setenv("OPENAI_API_KEY", "x")
    make_tiny_llama(max_position_embeddings=8192).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"instruction": f"Say {n}.", "output": f"{n}, gladly."} for n in range(8)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    with JudgeServer(lambda prompt, attempt: '{"winner": "A"}') as server:
        text = TUNED.format(model=tmp_path / "model", pairs=pairs, url=server.url)
        (tmp_path / "sweep.yaml").write_text(text)
        assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]) == 0
    with open(tmp_path / "run" / "scores.csv") as file:
        found = [row for row in csv.DictReader(file) if (row["metric"], row["group"]) == ("win_rate", "overall")]
    rates = {row["setting"]: float(row["score"]) for row in found}
    assert rates["dense-tuned"] == 0.5  # against itself
    assert 0 <= rates["pruned-tuned@0.5"] <= 0.5  # ties, and what is empty loses
    record = json.loads((tmp_path / "run/evaluations/pruned-tuned@0.5/kick.json").read_text())
    assert record["sparsity"] >= 0.49


def test_one_setting_of_a_sweep_file_alone(sweep, tmp_path, capsys):
    out = tmp_path / "sheared"
    assert cli.main(["compress", str(sweep), "sheared@1x16x24x2", "--out", str(out)]) == 0
    record = json.loads((out / "kick.json").read_text())
    assert record["setting"]["params"]["pruning"]["steps"] == 6
    assert record["calibration"] is None
    assert "training/1-sheared/pruning/history.jsonl" in record["files"]
    assert cli.main(["inspect", str(out)]) == 0
    assert cli.main(["compress", str(sweep), "shaered@1x16x24x2", "--out", str(tmp_path / "b")]) == 2
    assert "Did you mean 'sheared@1x16x24x2'?" in capsys.readouterr().err
    assert cli.main(["compress", str(sweep), "wanda@2:4", "--param", "x=1", "--out", str(tmp_path / "b")]) == 2
    assert not (tmp_path / "b").exists()


def test_parameters_with_parts_are_given_by_dots(tiny_model, tmp_path, capsys):
    command = ["compress", str(tiny_model), "sheared@1x16x24x2", "--out", str(tmp_path / "s"), "--param", "held_out=1"]
    stage = ["steps=2", "batch_size=2", "sequence_length=16"]
    parts = [f"--param=pruning.{part}" for part in stage] + [f"--param=continuing.{part}" for part in stage]
    assert cli.main([*command, *parts]) == 0
    assert json.loads((tmp_path / "s/kick.json").read_text())["setting"]["params"]["continuing"]["steps"] == 2


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(tiny_model, tmp_path):
    """kill -9 while it trains; the same command again."""

    def command(out):
        params = ["steps=400", "batch_size=2", "sequence_length=16", "checkpoint_every=20", "slorb=16"]
        return ["compress", str(tiny_model), "ast@2:4", "--out", str(out), *(f"--param={param}" for param in params)]

    out = tmp_path / "killed"
    program = f"from kick.cli import main; main({command(out)!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob(".killed.*.work/*/state-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not out.exists()
    torch.set_num_threads(1)  # as in the process that was killed
    begun = max(int(path.name[6:]) for path in tmp_path.glob(".killed.*.work/*/state-*"))
    assert 0 < begun < 400
    assert cli.main(command(out)) == 0
    assert cli.main(command(tmp_path / "whole")) == 0
    torch.set_num_threads(os.cpu_count() or 1)
    records = [json.loads((tmp_path / name / "kick.json").read_text()) for name in ("killed", "whole")]
    assert records[0]["weights_fingerprint"] == records[1]["weights_fingerprint"]
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "training/1-ast/history.jsonl").read_text().splitlines()
        ]
        for name in ("killed", "whole")
    ]
    assert losses[0] == losses[1]
    assert not list(tmp_path.glob(".*"))


SHARED = {
    "magnitude@0.5": [],
    "ast@2:4": ["steps=4", "sequence_length=16", "sharding=fsdp", "update_every=2", "held_out=2"],
    "sheared@1x16x24x2": [
        f"{stage}.{option}"
        for stage in ("pruning", "continuing")
        for option in ("steps=3", "batch_size=2", "sequence_length=16", "sharding=fsdp")
    ],
}


@pytest.mark.parametrize("setting", SHARED)
def test_several_processes_write_one_checkpoint(setting, tiny_model, tmp_path):
    """Under torchrun, for what trains and for what does not: the first process writes and speaks."""
    program = tmp_path / "program.py"
    program.write_text("import sys\nfrom kick.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    port = free_port()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    params = [f"--param={param}" for param in SHARED[setting]]
    command = ["compress", str(tiny_model), setting, "--out", str(tmp_path / "out"), *params]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(program), *command], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("verified") == 0
    assert done.stdout.count(f"{setting} of ") == 1
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    assert not list(tmp_path.glob(".*"))


def test_a_dry_run_says_what_training_takes(sweep, tmp_path, capsys):
    assert cli.main(["sweep", str(sweep), "--out", str(tmp_path / "run"), "--dry-run", "--json"]) == 0
    training = json.loads(capsys.readouterr().out)["training"]
    assert {name: cost["tokens"] for name, cost in training.items()} == {
        "ast@2:4 > rtn@4": 6 * 4 * 32,
        "llm_pruner@0.1 > tune": 6 * 8 * 32,
        "sheared@1x16x24x2": 2 * 6 * 4 * 32,
    }
    assert all(cost["seconds_here"] > 0 and cost["a100_hours"] > 0 for cost in training.values())


def test_the_papers_runs_cost_what_their_papers_say(tiny_model):
    """Sheared LLaMA pruned 0.42 B tokens at 15,000 a second on 8 A100: 62 hours of one."""
    from accelerate import init_empty_weights

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with init_empty_weights():
        skeleton = LlamaForCausalLM(config)
    pruning = {"steps": 3200, "batch_size": 32, "sequence_length": 4096}
    sheared = Sheared(Sheared.Params(pruning=pruning))
    cost = sheared.cost(Shape(name="1.3B"), skeleton)
    assert cost.tokens == 419_430_400
    hours = cost.operations / (312e12 * 0.35) / 3600
    assert 62 / 2 < hours < 62 * 2
    assert cost.memory_bytes == 16 * 6_738_415_616
    ast = AST(AST.Params(steps=10, batch_size=1, sequence_length=10))
    assert ast.cost(Pattern(keep=2, of=4), skeleton).operations == 100 * 8 * 6_738_415_616
    linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert ast.cost(Pattern(keep=2, of=4), skeleton).memory_bytes == (16 + 4) * 6_738_415_616 + 2 * linears
    twice = AST(AST.Params(steps=10, batch_size=1, sequence_length=10, gradient_checkpointing=True, distillation=0))
    assert twice.cost(Pattern(keep=2, of=4), skeleton).operations == 100 * 8 * 6_738_415_616
    taught = AST(AST.Params(steps=10, batch_size=1, sequence_length=10, teacher=str(tiny_model)))
    small = sum(parameter.numel() for parameter in LlamaForCausalLM.from_pretrained(tiny_model).parameters())
    assert taught.cost(Pattern(keep=2, of=4), skeleton).operations == 100 * (6 * 6_738_415_616 + 2 * small)


def test_a_model_that_is_to_be_shared_out_is_not_by_a_sweep(sweep, tmp_path, capsys):
    plan = ["sweep", str(sweep), "--out", str(tmp_path / "run"), "--dry-run"]
    assert cli.main(plan) == 0
    assert "fsdp" not in capsys.readouterr().out
    shared = "settings=[{compressor: sheared, levels: [1x16x24x2], params: {continuing: {sharding: fsdp}}}]"
    assert cli.main([*plan, "--set", shared]) == 0
    assert "sheared@1x16x24x2: sharding: fsdp shares the model among processes of torchrun" in capsys.readouterr().out


def test_the_slurm_script_starts_torchrun_on_each_node(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\necho node-a\necho node-b\n")
    (tools / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tools / "kick").write_text("#!/bin/sh\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "17"}
    environment = {**os.environ, **slurm, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    script = ["bash", str(REPOSITORY / "configs/trained/train.sbatch"), "sweep.yaml", "ast@2:4", "a folder"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-id 17 --rdzv-backend c10d --rdzv-endpoint node-a:29500 "
        f"{tools}/kick compress sweep.yaml ast@2:4 --out a folder"
    )


def test_a_setting_that_reads_other_text_is_another(tmp_path, tiny_model, capsys):
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 400)
    ast = AST(AST.Params(data=str(text)))
    before = ast.inputs()
    text.write_text("one two three four " * 400)
    assert ast.inputs() != before
