"""Streamed models give the same bytes as models in memory, and hold no more than a block."""

import json

import pytest
import torch
from conftest import make_tiny_llama
from safetensors.torch import load_file
from test_checkpoint import SMALL

from kick.blocks import find_decoder
from kick.checkpoint import verify
from kick.compress import Recipe, compress
from kick.errors import ConfigError, ModelError
from kick.loading import load_model
from kick.models import find_source
from kick.settings import parse_setting
from kick.streaming import open_streamed, resident

SETTINGS = ["dense", "magnitude@0.5", "wanda@2:4", "sparsegpt@0.5", "gptq@4", "awq@4", "wanda@2:4 > gptq@4"]


def made(path, out, text, stream, **changes):
    setting = parse_setting(text)
    source = find_source(str(path))
    return compress(Recipe.of(source, setting, SMALL, stream=stream), out)


def tensors(checkpoint):
    files = checkpoint.path.glob("model*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("text", SETTINGS)
def test_the_same_bytes_with_and_without(tiny_model, tmp_path, text):
    whole, streamed = (made(tiny_model, tmp_path / str(stream), text, stream) for stream in (False, True))
    expected, found = tensors(whole), tensors(streamed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert streamed.record["layers"] == whole.record["layers"]
    assert verify(streamed) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["False", "True"]  # no scratch is left


def test_plain_transformers_loads_what_was_streamed(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    whole, streamed = (made(tiny_model, tmp_path / str(stream), "wanda@0.5", stream) for stream in (False, True))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        first, second = (AutoModelForCausalLM.from_pretrained(c.path).eval()(tokens).logits for c in (whole, streamed))
    assert torch.equal(first, second)
    index = json.loads((streamed.path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3  # two blocks and the rest


@pytest.mark.parametrize("tied", [True, False])
def test_a_streamed_model_runs_and_lets_its_blocks_go(tmp_path, tied):
    whole = make_tiny_llama(tie_word_embeddings=tied)
    whole.save_pretrained(tmp_path / "model")
    model = open_streamed(tmp_path / "model", "float32", tmp_path)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, whole(tokens).logits)
    assert all(weight.is_meta for weight in model.model.layers.parameters())
    assert not model.lm_head.weight.is_meta
    block = find_decoder(model).blocks[0].module
    with resident(block):
        assert not any(weight.is_meta for weight in block.parameters())
    assert all(weight.is_meta for weight in block.parameters())


def test_only_a_change_that_is_meant_is_kept(tiny_model, tmp_path):
    model = open_streamed(tiny_model, "float32", tmp_path)
    block = find_decoder(model).blocks[0].module
    for changed, expected in [(False, False), (True, True)]:
        with resident(block, changed=changed):
            block.mlp.up_proj.weight.zero_()
        with resident(block):
            assert bool((block.mlp.up_proj.weight == 0).all()) == expected


def test_what_cannot_be_streamed_says_so(tiny_model, tmp_path, tokenizer):
    from kick.compress import check_streamable
    from kick.compressor import Compressor
    from kick.outcome import Step

    class Whole(Compressor):
        def compress(self, model, level, calibration, *, progress=None):
            return model

    with pytest.raises(ConfigError, match="cannot be streamed"):
        check_streamable([Step(parse_setting("whole@0.5"), Whole(), None)], "cpu")
    with pytest.raises(ConfigError, match="cannot run on 'cuda'"):
        check_streamable([], "cuda")
    with pytest.raises(ModelError, match=r"model\.gguf cannot be streamed"):
        open_streamed(tmp_path / "model.gguf", "float32", tmp_path)
    renamed = {name.replace("mlp", "ffn"): value for name, value in load_file(tiny_model / "model.safetensors").items()}
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    from safetensors.torch import save_file

    save_file(renamed, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"hold no tensor 'model\.layers\.0\.mlp"):
        open_streamed(other, "float32", tmp_path)


def test_links_into_a_cache_are_followed(tiny_model, tmp_path):
    """As the hub's cache lays models out: links in a snapshot, files elsewhere."""
    streamed = made(tiny_model, tmp_path / "sharded", "dense", True).path
    snapshot = tmp_path / "cache" / "snapshot"
    snapshot.mkdir(parents=True)
    for file in streamed.iterdir():
        (snapshot / file.name).symlink_to(file)
    model, whole = open_streamed(snapshot, "float32", tmp_path), load_model(streamed, "float32", "cpu")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, whole(tokens).logits)


def test_an_index_that_points_elsewhere_is_refused(tiny_model, tmp_path):
    streamed = made(tiny_model, tmp_path / "sharded", "dense", True).path
    index = streamed / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(ModelError, match="outside its directory"):
        open_streamed(streamed, "float32", tmp_path)
