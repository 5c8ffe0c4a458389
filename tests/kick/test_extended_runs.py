"""Runs that a longer sweep file goes on with: what is added is asked, what was answered stays and is not mixed up."""

import json
import shutil

import pytest
from conftest import swept
from test_sweep import SWEEP

from kick import cli


@pytest.fixture
def config(tmp_path, tiny_model):
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.format(model=tiny_model))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    return swept(tmp_path_factory.mktemp("extended"), SWEEP.format(model=tiny_model))


LONGER = """
model: {model}
data: embedded
settings: ["wanda@0.5", magnitude@0.5]
calibration: {{samples: 2, sequence_length: 32}}
suites:
  - {{suite: divergence, limit: 4}}
  - {{suite: factoid_qa, params: {{shots: 2, max_new_tokens: 6}}, limit: 20}}
lm: {{batch_size: 4}}
"""


def test_a_run_goes_on_with_what_decides_no_answer_as_it_is_now(tmp_path, tiny_model, mirror):
    """Where data lie, how many workers there are, who judges."""
    path, out = tmp_path / "sweep.yaml", tmp_path / "run"
    path.write_text(SWEEP.format(model=tiny_model))
    assert cli.main(["sweep", str(path), "--out", str(out)]) == 0
    before = json.loads((out / "run.json").read_text())
    assert cli.main(["sweep", str(path), "--out", str(out), "--set", "executor={name: inline, retries: 7}"]) == 0
    after = json.loads((out / "run.json").read_text())
    assert after["config"]["executor"]["retries"] == 7
    assert {**after, "config": 0} == {**before, "config": 0}


def test_settings_and_suites_may_be_added_to_a_run(tmp_path, tiny_model, capsys):
    """What was answered is not asked again, and all of it is what one run of the longer file gives."""
    longer, shorter = tmp_path / "longer.yaml", tmp_path / "shorter.yaml"
    longer.write_text(LONGER.format(model=tiny_model))
    lines = LONGER.format(model=tiny_model).replace('"wanda@0.5", ', "").split("\n")
    shorter.write_text("\n".join(line for line in lines if "divergence" not in line))
    assert cli.main(["sweep", str(longer), "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "run"
    assert cli.main(["sweep", str(shorter), "--out", str(out)]) == 0
    answered = {path: path.stat().st_mtime_ns for path in out.glob("evaluations/*/factoid_qa/samples.jsonl")}
    begun = json.loads((out / "run.json").read_text())
    capsys.readouterr()
    assert cli.main(["sweep", str(longer), "--out", str(out), "--dry-run"]) == 0
    assert "6 evaluations, 2 already there, 4 to do" in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text()) == begun
    assert cli.main(["sweep", str(longer), "--out", str(out)]) == 0
    assert len(answered) == 2
    assert all(path.stat().st_mtime_ns == when for path, when in answered.items())
    assert (out / "scores.csv").read_bytes() == (tmp_path / "whole" / "scores.csv").read_bytes()
    extended = json.loads((out / "run.json").read_text())
    whole = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert extended["started"] == begun["started"]
    assert {**extended, "started": 0} == {**whole, "started": 0}
    assert cli.main(["sweep", str(longer), "--out", str(out)]) == 0  # and it is taken up again as any run


def test_a_suite_of_another_lm_may_be_added(tmp_path, tiny_model):
    """It is compared with the run's own, which a variant that only asks in other batches need not be."""
    text = LONGER.format(model=tiny_model).replace('"wanda@0.5", magnitude@0.5', "")
    (tmp_path / "sweep.yaml").write_text(text)
    sweep = ["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "run")]
    assert cli.main(sweep) == 0
    mmlu = "  - {suite: mmlu, limit: 4, lm: {params: {row_tokens: 64}}}\nlm:"
    variant = "settings: [{compressor: dense, params: {lm: {batch_size: 1}}, label: one by one}]"
    (tmp_path / "sweep.yaml").write_text(text.replace("lm:", mmlu).replace("settings: []", variant))
    assert cli.main(sweep) == 0
    parity = json.loads((tmp_path / "run" / "run.json").read_text())["parity"]
    assert {(row["lm"], tuple(row["params"].items())) for row in parity} == {("fast", (("row_tokens", 64),))}


def test_what_was_never_answered_may_be_left_out(finished, config, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    text = config.read_text()
    config.write_text(text.replace("magnitude@0.5", "magnitude@0.5, magnitude@0.9"))
    asked = ["sweep", str(config), "--out", str(out)]
    assert cli.main(asked) == 0
    config.write_text(text)
    assert cli.main(asked) == 2
    assert "settings.magnitude@0.9 is only there" in capsys.readouterr().err
    shutil.rmtree(out / "evaluations" / "magnitude@0.9")
    assert cli.main(asked) == 0
    assert (out / "scores.csv").read_bytes() == (finished / "scores.csv").read_bytes()


def test_weights_of_a_setting_that_left_are_not_taken_for_another_of_its_name(tmp_path, tiny_model):
    out, file = tmp_path / "run", tmp_path / "sweep.yaml"
    suites = "suites: [{suite: factoid_qa, limit: 4}]\nkeep_checkpoints: true\ndata: embedded\n"

    def sweep(rule):
        grid = f"{{compressor: magnitude, levels: [0.5], label: gentle, layers: [{rule}]}}" if rule else ""
        file.write_text(f"model: {tiny_model}\nsettings: [{grid}]\n{suites}")
        assert cli.main(["sweep", str(file), "--out", str(out)]) == 0
        return json.loads((out / "evaluations" / "gentle@0.5" / "kick.json").read_text())["sparsity"] if rule else None

    first = sweep("{first: 1, skip: true}")
    shutil.rmtree(out / "evaluations" / "gentle@0.5")
    second = sweep("{last: 1, level: 0.9}")  # changed in one step
    assert (round(first, 2), round(second, 2)) == (0.25, 0.7)
    shutil.rmtree(out / "evaluations" / "gentle@0.5")
    sweep("")
    assert not (out / "checkpoints" / "gentle@0.5").exists()
    assert sweep("{first: 1, skip: true}") == first


def test_answers_of_a_checkpoint_as_it_is_are_no_part_of_a_sweep_of_it(tmp_path, tiny_model, capsys):
    made, out = str(tmp_path / "made"), str(tmp_path / "run")
    assert cli.main(["compress", str(tiny_model), "magnitude@0.5", "--out", made]) == 0
    asked = ["--suite", "factoid_qa", "--limit", "4", "--data", "embedded"]
    assert cli.main(["evaluate", made, *asked, "--out", out]) == 0
    (tmp_path / "sweep.yaml").write_text(
        f"model: {made}\ndata: embedded\nsettings: [magnitude@0.5]\nsuites: [{{suite: factoid_qa, limit: 4}}]\n"
    )
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--out", out]) == 2
    assert "settings.magnitude@0.5.as_is is only there" in capsys.readouterr().err


def test_nothing_may_be_taken_from_a_run(finished, config, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    lines = config.read_text().replace("magnitude@0.5, ", "").split("\n")
    config.write_text("\n".join(line for line in lines if "mmlu" not in line))
    assert cli.main(["sweep", str(config), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "settings.magnitude@0.5 is only there; suites.mmlu is only there" in error
    assert "may be added" in error
