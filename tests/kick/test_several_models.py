"""One sweep file for several models: a run for each, and a leaderboard of all."""

import csv
import json
import shutil

import pytest
from test_sweep import SWEEP

from kick import cli, commands
from kick.errors import RunError


@pytest.fixture
def config(tmp_path, tiny_model):
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.format(model=tiny_model))
    return path


def test_a_mistake_in_the_last_of_several_models_is_said_before_the_first_is_run(config, tmp_path, tiny_model, capsys):
    config.write_text(config.read_text().replace(f"model: {tiny_model}", f"model: [{tiny_model}, nothere]"))
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "runs")]) == 2
    assert "nothere" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_several_models_have_a_run_each_and_one_leaderboard(config, tmp_path, tiny_model, capsys):
    twin = tmp_path / "twin"
    shutil.copytree(tiny_model, twin)
    text = config.read_text().replace(f"model: {tiny_model}", f"model: [{tiny_model}, {twin}]")
    config.write_text(text.replace('settings: [magnitude@0.5, "wanda@2:4"]', "settings: [magnitude@0.5]"))
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "runs")]) == 0
    with open(tmp_path / "runs" / "leaderboard.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["model"], row["setting"]) for row in rows} == {
        (str(model), setting) for model in (tiny_model, twin) for setting in ("dense", "magnitude@0.5")
    }
    page = (tmp_path / "runs" / "index.html").read_text(encoding="utf-8")
    assert "Small and dense, or large and sparse" in page
    capsys.readouterr()
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "runs"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)  # one, not one a model
    assert {model: len(run["leaderboard"]) for model, run in document["models"].items()} == {
        str(tiny_model): 2,
        str(twin): 2,
    }


def with_models(config, tiny_model, *models):
    text = config.read_text().replace(f"model: {tiny_model}", f"model: [{', '.join(map(str, models))}]")
    config.write_text(text.replace('settings: [magnitude@0.5, "wanda@2:4"]', "settings: [magnitude@0.5]"))


def test_a_target_that_does_not_fit_the_last_model_is_said_before_the_first_is_run(
    config, tmp_path, tiny_model, capsys
):
    from conftest import make_tiny_llama

    odd = tmp_path / "odd"
    shutil.copytree(tiny_model, odd)
    make_tiny_llama(num_hidden_layers=1).save_pretrained(odd)
    with_models(config, tiny_model, tiny_model, odd)
    rule = "settings.0={compressor: magnitude, levels: ['0.5'], layers: [{match: 'model.layers.1.*', skip: true}]}"
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "runs"), "--set", rule]) == 2
    assert "model.layers.1.*" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_what_ends_the_run_of_one_model_does_not_end_the_others(config, tmp_path, tiny_model, capsys, monkeypatch):
    twin = tmp_path / "twin"
    shutil.copytree(tiny_model, twin)
    with_models(config, tiny_model, tiny_model, twin)
    run = commands._run

    def run_it(plan, out, options):
        if plan.source.name == str(tiny_model):
            raise RunError("its folder is being written.", "Wait for it.")
        return run(plan, out, options)

    monkeypatch.setattr(commands, "_run", run_it)
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "runs")]) == 1
    said = capsys.readouterr()
    assert f"{tiny_model}: its folder is being written." in said.err
    assert "no leaderboard of all models" in said.err
    assert len(list((tmp_path / "runs").glob("*/report.html"))) == 1
