import json
from pathlib import Path

import pytest
import torch

from kick import checkpoint as checkpoints
from kick.calibration import CalibrationSpec
from kick.compress import Recipe, compress, prepare
from kick.errors import CheckpointError, ConfigError, KickError, LevelError
from kick.levels import Pattern
from kick.measured import pattern_violations
from kick.models import find_source, fingerprint
from kick.settings import Setting

SMALL = CalibrationSpec(samples=4, sequence_length=32)


def make(model, out, compressor, level="", layers=(), **params):
    source = find_source(str(model))
    setting = Setting(compressor=compressor, level=level, params=params, layers=layers)
    return compress(Recipe.of(source, setting, SMALL), out)


@pytest.fixture(scope="module")
def pruned(tiny_model, tmp_path_factory):
    return make(tiny_model, tmp_path_factory.mktemp("checkpoints") / "wanda", "wanda", "2:4")


def test_plain_transformers_loads_it(pruned):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(pruned.path)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert (weight != 0).float().mean() == 0.5
    assert model.lm_head.weight is model.model.embed_tokens.weight  # still tied
    assert AutoTokenizer.from_pretrained(pruned.path)("tide")["input_ids"]


def test_the_record_holds_what_was_measured(pruned, tiny_model):
    record = json.loads((pruned.path / "kick.json").read_text())
    assert record["setting"]["compressor"] == "wanda"
    assert record["setting_name"] == "wanda@2:4"
    assert record["sparsity"] == 0.5
    assert record["pattern_violations"] == 0
    # two layers of q 32x32, k and v 16x32, o 32x32, gate and up 64x32, down 32x64; embeddings 600x32, five norms of 32
    assert record["parameters"] == 2 * (1024 + 512 + 512 + 1024 + 3 * 2048) + 600 * 32 + 5 * 32
    assert len(record["layers"]) == 14
    layer = record["layers"]["model.layers.0.self_attn.k_proj"]
    assert layer["shape"] == [16, 32]
    assert (layer["weights"], layer["zeros"]) == (512, 256)
    assert 0 < layer["weight_error"] < 1
    assert 0 < layer["reconstruction_error"] < 1
    assert record["source"]["fingerprint"] == fingerprint(tiny_model)
    assert record["calibration"]["tokens"] == 4 * 32
    assert record["bytes"] == sum(f.stat().st_size for f in pruned.path.glob("*.safetensors"))
    assert record["bits_per_weight"] == 32  # dense storage: a zero takes the room of any weight
    for key in ("seconds", "peak_memory_bytes"):
        assert record[key] > 0
    assert {"torch", "transformers", "llm-kick"} <= record["versions"].keys()


def test_an_untouched_checkpoint_verifies(pruned):
    assert checkpoints.verify(checkpoints.read(pruned.path)) == []


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_byte_is_noticed(tiny_model, tmp_path, file):
    made = make(tiny_model, tmp_path / "checkpoint", "magnitude", "0.5")
    path = made.path / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert any(file in problem for problem in checkpoints.verify(checkpoints.read(made.path)))


def test_missing_added_and_miscounted_are_noticed(tiny_model, tmp_path):
    made = make(tiny_model, tmp_path / "checkpoint", "magnitude", "0.5")
    (made.path / "extra.bin").write_bytes(b"x")
    assert checkpoints.verify(made) == ["extra.bin was added"]
    (made.path / "extra.bin").unlink()
    made.record["layers"]["model.layers.1.mlp.down_proj"]["zeros"] += 1
    assert checkpoints.verify(made) == ["kick.json has changed: its figures are not the recorded ones"]
    made.record["record_sha256"] = checkpoints._record_sha256(made.record)
    assert checkpoints.verify(made) == ["model.layers.1.mlp.down_proj: zeros is 1024, recorded 1025"]
    (made.path / "config.json").unlink()
    assert checkpoints.verify(made) == ["config.json is missing"]


def test_violations_are_groups_that_keep_too_many():
    weight = torch.tensor([[1.0, 1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1]])
    assert pattern_violations(weight, Pattern(keep=2, of=4)) == 2


def test_a_failed_compression_leaves_nothing(tiny_model, tmp_path):
    with pytest.raises(KickError, match="does not divide"):
        make(tiny_model, tmp_path / "out", "wanda", "2:7")
    assert list(tmp_path.iterdir()) == []


def test_half_a_checkpoint_is_none(tmp_path, pruned):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoints.read(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"holds no kick\.json"):
        checkpoints.read(tmp_path)
    (tmp_path / "kick.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.read(tmp_path)


def test_the_same_recipe_gives_the_same_weights(tiny_model, tmp_path, pruned):
    again = make(tiny_model, tmp_path / "again", "wanda", "2:4")
    assert again.fingerprint == pruned.fingerprint
    assert again.fingerprint != make(tiny_model, tmp_path / "other", "magnitude", "2:4").fingerprint


def test_dense_is_a_checkpoint_too(tiny_model, tmp_path):
    made = make(tiny_model, tmp_path / "dense", "dense")
    assert made.record["sparsity"] == 0
    assert made.record["calibration"] is None


def test_settings_are_checked_before_a_model_is_loaded():
    with pytest.raises(LevelError, match=r"setting 'wanda@3:2'"):
        prepare(Setting(compressor="wanda", level="3:2"))
    with pytest.raises(ConfigError, match="unknown key 'sparsity'"):
        prepare(Setting(compressor="wanda", level="2:4", params={"sparsity": 0.5}))
    with pytest.raises(LevelError, match="takes no level"):
        prepare(Setting(compressor="dense", level="0.5"))


def test_a_compressor_that_breaks_the_model_writes_nothing(tiny_model, tmp_path, monkeypatch):
    from kick_compressors.magnitude import Magnitude

    monkeypatch.setattr(Magnitude, "solve", lambda self, weight, statistic, level: weight * float("nan"))
    with pytest.raises(KickError, match="not finite"):
        make(tiny_model, tmp_path / "out", "magnitude", "0.5")
    monkeypatch.setattr(Magnitude, "solve", lambda self, weight, statistic, level: weight)
    with pytest.raises(KickError, match="groups keep more weights"):
        make(tiny_model, tmp_path / "out", "magnitude", "2:4")
    with pytest.raises(KickError, match=r"has a sparsity of 0\.0000 where 0\.5 was asked"):
        make(tiny_model, tmp_path / "out", "magnitude", "0.5")
    monkeypatch.setattr(Magnitude, "solve", lambda self, weight, statistic, level: weight * 0)
    with pytest.raises(KickError, match=r"has a sparsity of 1\.0000 where 0\.5 was asked"):
        make(tiny_model, tmp_path / "out", "magnitude", "0.5")
    monkeypatch.setattr(Magnitude, "solve", lambda self, weight, statistic, level: 1 / 0)
    with pytest.raises(KickError, match=r"magnitude@0\.5 failed: ZeroDivisionError"):
        make(tiny_model, tmp_path / "out", "magnitude", "0.5")
    assert list(Path(tmp_path).iterdir()) == []


def test_a_record_that_was_edited_is_noticed(tiny_model, tmp_path):
    made = make(tiny_model, tmp_path / "checkpoint", "magnitude", "0.5")
    path = made.path / "kick.json"
    path.write_text(path.read_text().replace('"sparsity": 0.5', '"sparsity": 0.9'))
    assert checkpoints.verify(checkpoints.read(made.path))
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "files": {"../../secret": {"bytes": 1, "sha256": ""}}}))
    with pytest.raises(CheckpointError, match="not its own"):
        checkpoints.read(made.path)


def test_files_may_be_links_to_where_the_hub_keeps_them(tiny_model, tmp_path):
    made = make(tiny_model, tmp_path / "checkpoint", "magnitude", "0.5")
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(path for path in made.path.rglob("*") if path.is_file()):
        blob = tmp_path / "blobs" / str(number)
        file.rename(blob)
        file.symlink_to(blob)
    assert checkpoints.verify(checkpoints.read(made.path)) == []


def test_zeros_that_the_source_had_come_on_top(tiny_model, tmp_path):
    once = make(tiny_model, tmp_path / "once", "magnitude", "0.5")
    twice = make(once.path, tmp_path / "twice", "wanda", "0.5")  # rows that magnitude left fuller or emptier than half
    assert twice.record["sparsity"] >= 0.5


def test_the_reconstruction_error_is_that_of_the_definition():
    import torch
    from kick_compressors.statistics import InputNorm

    statistic = InputNorm(2, torch.device("cpu"))
    statistic.see(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))  # norms 5 and 2
    weight, change = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, -1.0]])
    assert statistic.output_error(weight, change) == pytest.approx(2 / (25 + 4) ** 0.5)
