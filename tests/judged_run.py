"""A run with answers that a judge can grade, and what tests of judging say to it: fixtures, known to every test."""

import csv
import json
import shutil

import pytest
from conftest import make_tiny_llama, swept

from kick import cli
from kick.judge.client import Judge
from kick.judge.spec import JudgeSpec

SWEEP = """
model: {model}
data: embedded
settings: [magnitude@0.5]
suites:
  - {{suite: mt_bench, params: {{max_new_tokens: 6}}, limit: 3}}
  - {{suite: summarization, params: {{max_new_tokens: 6}}, limit_per_group: 1}}
"""


@pytest.fixture(scope="session")
def roomy_model(tmp_path_factory, tokenizer):
    """A tiny model whose context holds the long stories."""
    path = tmp_path_factory.mktemp("models") / "roomy"
    make_tiny_llama(max_position_embeddings=8192).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def answered(tmp_path_factory, roomy_model):
    """A run with the answers of a dense and a pruned tiny model; its sweep file lies beside it."""
    return swept(tmp_path_factory.mktemp("judge"), SWEEP.format(model=roomy_model))


@pytest.fixture
def answered_run(answered, tmp_path):
    """A copy of it that may be judged."""
    shutil.copytree(answered, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def no_waiting(monkeypatch):
    """Retries come at once; gives the seconds that they would have waited."""
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
    """setting -> its row of scores.csv."""
    return {
        row["setting"]: row
        for row in all_rows(run)
        if (row["suite"], row["metric"], row["group"]) == (suite, metric, group)
    }


def all_rows(run):
    """scores.csv, written anew."""
    cli.main(["report", str(run)])
    with open(run / "scores.csv") as file:
        return list(csv.DictReader(file))
