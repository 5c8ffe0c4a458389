import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import make_tiny_llama
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from kick import cli, devices, loading, models
from kick.errors import ConfigError, ModelError
from kick.streaming import open_streamed


def test_a_directory_is_loaded_as_it_is(tiny_model):
    source = models.find_source(str(tiny_model))
    assert source.kind == "directory"
    model = loading.load_model(source.path, "float32", "cpu")
    assert model.dtype == torch.float32
    assert not model.training


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2-153m", "Did you mean 'smollm2-135m'"),
        ("smollm2", "no model called 'smollm2'"),
        ("gpt2", "no model called 'gpt2'"),
        ("./no/such/folder", "no model called"),
    ],
)
def test_an_unknown_model_fails_at_once(name, says):
    with pytest.raises(ModelError, match=says) as error:
        models.find_source(name)
    assert "smollm2-135m" in str(error.value)


def test_a_misspelt_folder_names_its_neighbour(tiny_model):
    with pytest.raises(ModelError, match=r"Did you mean .*tiny-llama"):
        models.find_source(str(tiny_model.parent / "tiny-lama"))


def test_a_hub_id_that_cannot_be_had_is_no_other_model():
    source = models.find_source("no-such-owner/no-such-model")
    assert source.kind == "hub"
    with pytest.raises(ModelError, match="no-such-owner/no-such-model"):
        models.fetch(source)


def test_pickles_and_empty_folders_are_refused(tmp_path, tiny_model):
    shutil.copy(tiny_model / "config.json", tmp_path)
    with pytest.raises(ModelError, match="no weights"):
        models.find_source(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="a pickle"):
        models.find_source(str(tmp_path))
    with pytest.raises(ModelError, match=r"no config\.json"):
        models.find_source(str(tmp_path.parent))
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match="not a model that kick reads"):
        models.find_source(str(tmp_path / "model.onnx"))


def test_code_in_a_models_folder_is_not_run(tmp_path, tiny_model):

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError):
        loading.load_model(folder, "float32", "cpu")
    with pytest.raises(ModelError):
        loading.load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_the_fingerprint_is_of_the_content(tmp_path, tiny_model):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    assert models.fingerprint(copy) == models.fingerprint(tiny_model)
    weights = next(copy.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert models.fingerprint(copy) != models.fingerprint(tiny_model)


@pytest.mark.parametrize(
    ("added", "refused"),
    [
        ("model.layers.0.self_attn.q_proj.bias", True),
        ("model.layers.1.self_attn.q_norm.weight", True),
        ("lm_head.bias", True),
        ("model.layers.2.mlp.up_proj.weight", False),  # of a block beyond the last: a part to predict further tokens
        ("vision_tower.patch.weight", False),
        ("model.layers.0.self_attn.bias", False),  # a causal mask, as GPT-J's old checkpoints hold it
        ("model.layers.0.self_attn.masked_bias", False),
    ],
)
def test_tensors_of_the_model_that_have_no_place_are_missed(added, refused, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, added: torch.zeros(32)}, folder / "model.safetensors", {"format": "pt"})
    if not refused:
        assert torch.equal(loading.load_model(folder, "float32", "cpu").model.norm.weight, weights["model.norm.weight"])
        return
    for load in (loading.load_model, open_streamed):
        where = "cpu" if load is loading.load_model else tmp_path / "scratch"
        with pytest.raises(
            ModelError, match=rf"holds '{added}' \(1 such tensors\), which its configuration has no place"
        ):
            load(folder, "float32", where)


def test_damaged_files_are_one_clear_error(tiny_model, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read.*\n.*git lfs pull"):
        loading.count_parameters(folder)
    asked = ["--suite", "perplexity", "--data", "embedded", "--out", str(tmp_path / "run")]
    assert cli.main(["evaluate", str(folder), *asked]) == 2
    assert "git lfs pull" in capsys.readouterr().err
    for text, says in (("{", r"config\.json cannot be read"), ("[]", r"config\.json holds no configuration")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError, match=says):
            loading.load_model(folder, "float32", "cpu")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"model\.gguf cannot be read"):
        loading.count_parameters(tmp_path / "model.gguf")


def test_a_folder_without_a_tokenizer(tmp_path):
    make_tiny_llama().save_pretrained(tmp_path / "weights")
    with pytest.raises(ModelError, match=r"weights holds no tokenizer.*\n.*Copy there"):
        loading.load_tokenizer(tmp_path / "weights")


def test_precision_and_device():
    assert devices.default_dtype("cpu") == "float32"
    assert devices.default_dtype("cuda") == "bfloat16"
    with pytest.raises(ConfigError, match="device 'gpu'"):
        devices.check_device("gpu")
    assert devices.is_usable("cpu")
    assert not devices.is_usable("meta")


@pytest.mark.real_model
def test_a_gguf_file_is_a_source(real_model):
    source = models.find_source(str(real_model.path))
    assert (source.kind, source.path) == ("gguf", real_model.path)
    assert models.fingerprint(source.path) == models.fingerprint(real_model.path)


@pytest.mark.real_model
def test_a_gguf_file_is_asked_for_in_plain_tensors(real_model, monkeypatch):
    """Where a kernel for its blocks is installed, transformers would leave them packed, with no linear to compress."""
    gguf = pytest.importorskip("transformers.quantizers.quantizer_gguf")
    config = pytest.importorskip("transformers").GgufConfig
    seen = []
    monkeypatch.setattr(
        gguf.GgufHfQuantizer,
        "update_dtype",
        lambda self, dtype, update=gguf.GgufHfQuantizer.update_dtype: (
            seen.append(self.quantization_config.dequantize) or update(self, dtype)
        ),
    )
    assert not config().dequantize
    model = loading.load_model(real_model.path, "bfloat16", "cpu")
    assert seen == [True]
    assert sum(type(module) is torch.nn.Linear for module in model.modules()) == 30 * 7 + 1
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.real_model
def test_the_packaged_model_is_what_its_file_says(real_checkpoint):
    record = real_checkpoint.record
    assert record["parameters"] == 134_515_008  # the published count, embeddings tied
    assert len(record["layers"]) == 30 * 7
    assert record["coverage"]["share"] == 1.0
    config = (real_checkpoint.path / "config.json").read_text()
    assert "quantization_config" not in config  # dequantised: saved as the plain model that it now is


@pytest.mark.skipif("not config.getoption('--hub', default=False)", reason="needs the Hugging Face hub: pytest --hub")
def test_a_hub_model_is_fetched():
    source = models.find_source("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert models.fetch(source).is_dir()


# The hub, over loopback

SWEEP = """
model: owner/tiny
settings: [wanda@0.5]
suites: [{suite: perplexity, limit: 2}]
data: embedded
"""


def run_with(hub, cache, *command, offline=False):
    """stdout of a Python process that takes `hub` for the Hugging Face hub."""
    cached = {"HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_HUB_OFFLINE": str(int(offline))}
    environment = {**os.environ, **cached, "HF_ENDPOINT": hub.root}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_checkpoint_on_the_hub_comes_with_its_adapters_and_its_setting(tiny_model, tmp_path):
    made = tmp_path / "made"
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{n} and {n} are {2 * n}. " * 20}) for n in range(20)))
    options = {"data": text, "steps": 2, "batch_size": 2, "sequence_length": 32, "slorb": 16}
    params = [f"--param={name}={value}" for name, value in options.items()]
    assert cli.main(["compress", str(tiny_model), "ast@2:4", "--out", str(made), *params]) == 0
    code = """if True:
        import torch
        from kick import loading, models
        there = models.fetch(models.find_source("owner/sparse"))
        print(float(loading.load_model(there, "float32", "cpu")(torch.arange(9)[None]).logits.sum()))"""
    with HubServer("owner/sparse", made) as hub:
        asked = ["-m", "kick.cli", "evaluate", "owner/sparse", "--suite", "perplexity", "--limit", "1"]
        run_with(hub, tmp_path / "cache", *asked, "--data", "embedded", "--out", tmp_path / "run")
        assert "adapter/adapter_model.safetensors" in hub.fetched
        fetched = float(run_with(hub, tmp_path / "cache", "-c", code))
    assert (tmp_path / "run/evaluations/ast@2:4").is_dir()
    tokens = torch.arange(9)[None]
    assert fetched == pytest.approx(
        float(loading.load_model(made, "float32", "cpu")(tokens).logits.detach().sum()), rel=1e-5
    )
    (made / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"its kick\.json names"):
        loading.load_model(made, "float32", "cpu")


def test_a_revision_on_the_hub_can_be_named(tmp_path):
    for name in ("main", "older"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    code = """if True:
        import sys
        from kick import models
        source = models.find_source(sys.argv[1])
        planned = models.fetch(source, weights=False)
        print(models.bytes_to_fetch(source, planned))
        there = models.fetch(source)
        print(there.name, (there / "model.safetensors").read_text())"""
    with HubServer("owner/tiny", tmp_path / "main") as hub:
        hub.branches = {"refs/pr/1": (tmp_path / "older", "e" * 40)}
        fetched = [
            run_with(hub, tmp_path / "cache", "-c", code, name).split()
            for name in ("owner/tiny", "owner/tiny@refs/pr/1", f"owner/tiny@{'e' * 40}")
        ]
    assert fetched == [["4", "c" * 40, "main"], ["5", "e" * 40, "older"], ["0", "e" * 40, "older"]]


@pytest.mark.parametrize("name", ["owner/@v1", "@v1/name", "owner/name@", "name@v1"])
def test_a_revision_needs_a_whole_id(name):
    with pytest.raises(ModelError, match="owner/name@revision"):
        models.find_source(name)


def test_a_dry_run_fetches_no_weights_from_the_hub_and_a_run_does(tiny_model, tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    weights = (tiny_model / "model.safetensors").stat().st_size

    def kick(*arguments):
        command = ["-m", "kick.cli", "sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "run", "--json"]
        return json.loads(run_with(hub, tmp_path / "cache", *command, *arguments))

    with HubServer("owner/tiny", tiny_model) as hub:
        planned = kick("--dry-run")
        assert planned["bytes_to_fetch"] == weights
        assert "config.json" in hub.fetched
        assert "model.safetensors" not in hub.fetched
        assert kick()["done"] == 2
        assert json.loads((tmp_path / "run/run.json").read_text())["model"]["commit"] == "c" * 40
        assert hub.fetched.count("model.safetensors") == 1
        shutil.rmtree(tmp_path / "cache")  # on another machine: what the run lacks depends on the weights
        after = kick("--dry-run")
        assert (after["missing"], after["bytes_to_fetch"]) == ({}, 0)
        assert after["estimated_memory_bytes"] == planned["estimated_memory_bytes"]  # parameters counted alike


LOOK = """
import sys
from kick import devices, loading, models
source = models.find_source("owner/tiny")
try:
    path = models.fetch(source, weights=False)
    print(models.bytes_to_fetch(source, path), loading.count_parameters(path))
except models.ModelError as error:
    print(error)
"""


def test_weights_are_there_once_all_parts_are(tiny_model, tmp_path):
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    make_tiny_llama().save_pretrained(repository, max_shard_size="100KB")
    parts = sorted(file.name for file in repository.glob("*.safetensors"))
    assert len(parts) == 2
    sizes = [(repository / part).stat().st_size for part in parts]
    parameters = loading.count_parameters(repository)
    (tmp_path / "look.py").write_text(LOOK)
    with HubServer("owner/tiny", repository) as hub:
        assert run_with(hub, cache, tmp_path / "look.py").split() == [str(sum(sizes)), str(parameters)]
        assert run_with(hub, cache, tmp_path / "look.py", offline=True).split() == ["None", str(parameters)]
        fetch_one = f"from huggingface_hub import hf_hub_download; hf_hub_download('owner/tiny', '{parts[0]}')"
        run_with(hub, cache, "-c", fetch_one)
        assert run_with(hub, cache, tmp_path / "look.py").split() == [str(sum(sizes[1:])), str(parameters)]
        fetch_all = "from kick import models; models.fetch(models.find_source('owner/tiny'))"
        run_with(hub, cache, "-c", fetch_all)
        hub.commit = "d" * 40  # what is there is looked at, whatever the hub has got since
        assert run_with(hub, cache, tmp_path / "look.py", offline=True).split() == ["0", str(parameters)]
        assert run_with(hub, cache, tmp_path / "look.py").split() == ["0", str(parameters)]
        for part in parts:
            (repository / part).unlink()
        (repository / "model.safetensors.index.json").unlink()
        shutil.rmtree(cache)
        assert "has no *.safetensors" in run_with(hub, cache, tmp_path / "look.py")


def test_a_plan_runs_no_code_that_a_configuration_names(tiny_model, tmp_path):
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attn_implementation": "who/kernel"}))
    with pytest.raises(ModelError, match="names code to fetch"):
        loading.load_skeleton(tmp_path, "float32")
    with pytest.raises(ModelError, match="names code to fetch"):
        open_streamed(tmp_path, "float32", tmp_path / "scratch")


def test_an_encoder_with_a_decoder_is_no_causal_model(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "bart")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": True}))
    with pytest.raises(ModelError, match="is an encoder with a decoder"):
        loading.load_model(folder, "float32", "cpu")


def test_folders_that_hold_something_else_than_a_model_say_what(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter, not a model"):
        models.find_source(str(tmp_path / "adapter"))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "one.gguf").touch()
    with pytest.raises(ModelError, match=r"The model is .*: name that"):
        models.find_source(str(tmp_path / "packed"))
