import pytest

from kick.config import load
from kick.errors import ConfigError
from kick.settings import Setting

MINIMAL = "model: m\nsuites: [perplexity]\n"


def write(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return path


def test_a_whole_file(tmp_path):
    text = """
model: smollm2-135m
settings:
  - magnitude@0.5
  - wanda@2:4
  - {compressor: wanda, levels: [0.5, 4:8], seeds: [0, 1], label: w}
suites:
  - perplexity
  - {suite: mmlu, label: letters, params: {shots: 3}, limit: 20}
data: embedded
calibration: {samples: 8, sequence_length: 64}
lm: {batch_size: 4}
"""
    config = load(write(tmp_path, text))
    assert [setting.name for setting in config.all_settings()] == [
        "dense", "magnitude@0.5", "wanda@2:4", "w@0.5#0", "w@0.5#1", "w@4:8#0", "w@4:8#1",
    ]  # fmt: skip
    assert [suite.name for suite in config.suites] == ["perplexity", "letters"]
    assert config.calibration.samples == 8


def test_a_pattern_without_quotes_is_not_a_base_sixty_number(tmp_path):
    config = load(write(tmp_path, MINIMAL + "settings: [{compressor: wanda, levels: [2:4, 1:2]}]\n"))
    assert [setting.level for setting in config.all_settings()[1:]] == ["2:4", "1:2"]


def test_dense_is_always_run_and_only_once(tmp_path):
    assert load(write(tmp_path, MINIMAL)).all_settings() == [Setting(compressor="dense")]
    config = load(write(tmp_path, MINIMAL + "settings: [magnitude@0.5, dense]\n"))
    assert [setting.name for setting in config.all_settings()] == ["dense", "magnitude@0.5"]


def test_overrides(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load(path, ["lm.batch_size=3", "suites.0={suite: mmlu, limit: 5}", "dtype=bfloat16"])
    assert (config.lm.batch_size, config.suites[0].limit, config.dtype) == (3, 5, "bfloat16")
    for bad, says in [
        ("lm.batch_size", "has no '='"),
        ("suites.7=x", "no such place"),
        ("suites.x=1", "no such place"),
    ]:
        with pytest.raises(ConfigError, match=says):
            load(path, [bad])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINIMAL + "modle: x\n", ["unknown key 'modle'", "Allowed there: model, settings"]),
        (MINIMAL + "lm: {batch: 3}\n", ["unknown key 'lm.batch'", "Allowed there: name, batch_size"]),
        ("model: m\nsuites: [{suite: mmlu, shots: 5}]\n", ["unknown key 'suites.0.shots'", "params"]),
        (MINIMAL + "lm: {batch_size: many}\n", ["lm.batch_size is 'many'", "valid integer"]),
        (MINIMAL + "lm: {batch_size: 0}\n", ["lm.batch_size is 0", "greater than or equal to 1"]),
        (MINIMAL + "dtype: fp8\n", ["dtype is 'fp8'", "'float32'"]),
        ("suites: [perplexity]\n", ["'model' is missing"]),
        ("model: m\nsuites: []\n", ["suites is ()", "at least 1"]),
        ("model: m\nsuites: perplexity\n", ["suites is 'perplexity'"]),
        ("just words", ["not a mapping"]),
        ("model: [", ["is not YAML"]),
        ("model: !!python/object/apply:os.system [ls]\n", ["is not YAML"]),
        (MINIMAL + "settings: [wanda@0.5, wanda@0.5]\n", ["two settings are called 'wanda@0.5'"]),
        ("model: m\nsuites: [mmlu, mmlu]\n", ["two suites are called 'mmlu'"]),
    ],
)
def test_a_wrong_file_says_which_key_and_what_is_allowed(tmp_path, text, says):
    with pytest.raises(ConfigError) as error:
        config = load(write(tmp_path, text))
        config.all_settings()
        config.all_suites()
    for words in says:
        assert words in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no sweep file"):
        load(tmp_path / "nothing.yaml")
