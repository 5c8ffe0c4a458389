import json

import pytest
from conftest import REPOSITORY

from kick.calibration import CalibrationSpec
from kick.errors import ConfigError
from kick.settings import Setting
from kick.sweep_file import load, parse, read_yaml, schema

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


def test_no_model_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"model is \[\]"):
        load(write(tmp_path, "model: []\nsuites: [perplexity]\n"))


def test_on_and_off_are_words():
    assert read_yaml("{a: on, b: off, c: yes, d: no, e: true, f: False, g: 'true'}", "here") == {
        "a": "on", "b": "off", "c": "yes", "d": "no", "e": True, "f": False, "g": "true",
    }  # fmt: skip


def test_dense_is_always_run_and_only_once(tmp_path):
    assert load(write(tmp_path, MINIMAL)).all_settings() == [Setting(compressor="dense")]
    config = load(write(tmp_path, MINIMAL + "settings: [magnitude@0.5, dense]\n"))
    assert [setting.name for setting in config.all_settings()] == ["dense", "magnitude@0.5"]


def test_overrides(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load(path, ["lm.batch_size=3", "suites.0={suite: mmlu, limit: 5}", "dtype=bfloat16"])
    assert (config.lm.batch_size, config.suites[0].limit, config.dtype) == (3, 5, "bfloat16")
    judged = load(write(tmp_path, MINIMAL + "judge: null\n"), ["judge.model=gpt"])
    assert judged.judge is not None
    assert judged.judge.model == "gpt"
    short = load(
        write(tmp_path, MINIMAL + 'settings: ["wanda@0.5 > gptq@4"]\n'),
        ["suites.0.limit=20", "settings.0.seeds=[1, 2]", "settings.1=magnitude@0.5", "suites.1=mmlu"],
    )
    assert [(suite.suite, suite.limit) for suite in short.suites] == [("perplexity", 20), ("mmlu", None)]
    names = [setting.name for setting in short.all_settings()]
    assert names == ["dense", "wanda@0.5 > gptq@4#1", "wanda@0.5 > gptq@4#2", "magnitude@0.5"]
    for bad, says in [
        ("lm.batch_size", "has no '='"),
        ("suites.7=x", "no such place"),
        ("suites.-1=x", "no such place"),
        ("suites.x=1", "no such place"),
    ]:
        with pytest.raises(ConfigError, match=says):
            load(path, [bad])


def make_all(config):
    """Settings and suites with what varies, whose names must be unique."""
    return config.all_settings(), config.all_suites()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINIMAL + "modle: x\n", ["unknown key 'modle'", "Did you mean 'model'?", "Allowed there: model, settings"]),
        (
            MINIMAL + "settings: [{compresor: wanda}]\n",
            ["unknown key 'settings.0.compresor'", "Did you mean 'compressor'?"],
        ),
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
        (MINIMAL + "executor: {workers: two}\n", ["executor.workers is 'two'.", "valid integer", "'auto'"]),
        (
            MINIMAL + "settings: [{compressor: wanda, layers: [{skp: true}]}]\n",
            ["'settings.0.layers.0.skp'", "Allowed there: first, last, match, level, skip."],
        ),
        (
            MINIMAL + "settings: [{compressor: wanda, allocation: {sprd: 1}}]\n",
            ["'settings.0.allocation.sprd'", "Allowed there: rule, outlier, spread."],
        ),
        ("model: m\nsuites: [{suite: mmlu, lm: {nme: fast}}]\n", ["'suites.0.lm.nme'", "Allowed there: name, batch"]),
        (MINIMAL + "settings: [wanda@0.5, wanda@0.5]\n", ["two settings are called 'wanda@0.5'"]),
        ("model: m\nsuites: [mmlu, mmlu]\n", ["two suites are called 'mmlu'"]),
        (MINIMAL + "settings: [magnitude@0.5, magnitude@.50]\n", ["two settings are called 'magnitude@0.5'"]),
        (MINIMAL + "settings: magnitude@0.5\n", ["settings is 'magnitude@0.5'", "should be a list"]),
        (MINIMAL + "lm: fast\n", ["lm is 'fast'", "should be a mapping, {...}."]),
        (MINIMAL + "settings: [{compressor: wanda, seeds: [-1]}]\n", ["settings.0.seeds.0 is -1", "greater than or"]),
        (
            MINIMAL + "settings: [{compressor: wanda, levels: [null]}]\n",
            ["settings.0.levels.0 is None", "valid string"],
        ),
        (MINIMAL + "calibration: {seed: 99999999999999999999999}\n", ["calibration.seed", "less than"]),
        (MINIMAL + 'settings: [{compressor: wanda, label: "a\\eb"}]\n', ["settings.0.label", "control characters"]),
        ("model: [m, m]\nsuites: [mmlu]\n", ["the model 'm' is named twice"]),
        (MINIMAL + "5: 6\n", ["the key 5 is no word"]),
        ("[" * 3000, ["is nested too deeply"]),
    ],
)
def test_a_wrong_file_says_which_key_and_what_is_allowed(tmp_path, text, says):
    with pytest.raises(ConfigError) as error:
        make_all(load(write(tmp_path, text)))
    for words in says:
        assert words in str(error.value)


def test_keys_that_do_not_go_together_are_said_without_the_whole_file():
    with pytest.raises(ConfigError) as caught:
        parse({"model": "m", "suites": ["mmlu"], "disk_budget_gb": 1}, "sweep.yaml")
    assert caught.value.message == "sweep.yaml: disk_budget_gb is of kept checkpoints: set keep_checkpoints: true."


@pytest.mark.parametrize("value", ["a|b.txt", "x\ny"])
def test_names_that_values_make_must_fit_a_table_too(value):
    config = parse(
        {
            "model": "m",
            "suites": ["mmlu"],
            "settings": [{"compressor": "wanda", "levels": [0.5], "vary": {"calibration.source": ["c4", value]}}],
        },
        "sweep.yaml",
    )
    with pytest.raises(ConfigError, match="a label may hold neither a bar"):
        config.all_settings()


def test_numbers_are_decimal():
    assert read_yaml("seeds: [010, 7]", "here") == {"seeds": [10, 7]}


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no sweep file"):
        load(tmp_path / "nothing.yaml")


# Grids


def names(tmp_path, text):
    return [setting.name for setting in load(write(tmp_path, text)).all_settings()[1:]]


def test_the_usual_levels_have_names(tmp_path):
    text = "model: m\nsuites: [mmlu]\nsettings:\n  - {compressor: wanda, levels: [sparsities, patterns]}\n"
    expected = [f"wanda@0.{n}" for n in range(1, 8)] + ["wanda@2:4", "wanda@4:8"]
    assert names(tmp_path, text) == expected
    text = "model: m\nsuites: [mmlu]\nsettings:\n  - {compressor: rtn, levels: bits}\n"
    assert names(tmp_path, text) == ["rtn@8", "rtn@4", "rtn@3", "rtn@2"]


def test_parameters_and_calibration_can_be_varied(tmp_path):
    text = (
        "model: m\nsuites: [mmlu]\ncalibration: {sequence_length: 64, seed: 5}\nsettings:\n"
        "  - {compressor: gptq, levels: [4], params: {group_size: 32}, seeds: [0, 2],\n"
        "     vary: {calibration.samples: [4, 8], calibration.source: [a/b.jsonl], damping: [0.1]}}\n"
    )
    settings = load(write(tmp_path, text)).all_settings()[1:]
    assert [setting.name for setting in settings] == [
        "gptq@4 samples=4 source=b damping=0.1#0",
        "gptq@4 samples=4 source=b damping=0.1#2",
        "gptq@4 samples=8 source=b damping=0.1#0",
        "gptq@4 samples=8 source=b damping=0.1#2",
    ]
    last = settings[-1]
    assert last.params == {"group_size": 32, "damping": 0.1}
    assert last.calibration.samples == 8
    assert last.calibration.sequence_length == 64
    assert last.calibration.seed == 7  # another run of the method has other text
    assert settings[0].calibration.seed == 5
    assert last.method == "gptq"


def test_a_calibration_key_that_does_not_exist(tmp_path):
    text = (
        "model: m\nsuites: [mmlu]\nsettings:\n  - {compressor: wanda, levels: [0.5], vary: {calibration.size: [1]}}\n"
    )
    with pytest.raises(ConfigError, match="unknown key 'size'"):
        load(write(tmp_path, text)).all_settings()


def test_suites_can_be_varied(tmp_path):
    text = "model: m\nsuites:\n  - {suite: mmlu, params: {format: cloze}, vary: {shots: [0, 5]}}\n"
    suites = load(write(tmp_path, text)).all_suites()
    assert [suite.name for suite in suites] == ["mmlu shots=0", "mmlu shots=5"]
    assert suites[1].params == {"format": "cloze", "shots": 5}


@pytest.mark.parametrize(
    ("compressor", "label", "expected"),
    [("wanda", "", "wanda > gptq"), ("wanda", "mine", "mine"), ("external", "a@b", "a@b")],
)
def test_a_method_is_what_is_left_of_a_name(compressor, label, expected):
    from kick.config import Grid

    chain = {"compressor": "gptq", "level": "4"}
    grid = Grid(compressor=compressor, levels=["0.5"], label=label, then=(chain,), seeds=(0, 1), vary={"x": (1,)})
    assert {setting.method for setting in grid.settings(CalibrationSpec())} == {expected}


# The schema and the template


def test_the_schema_for_editors_is_the_one_that_is_shipped():
    shipped = json.loads((REPOSITORY / "configs/schema.json").read_text(encoding="utf-8"))
    again = "python -c 'import json; from kick.sweep_file import schema; print(json.dumps(schema(), indent=2))'"
    assert shipped == json.loads(json.dumps(schema())), f"write it again: {again} > configs/schema.json"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweep_files_fit_the_schema(path):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(read_yaml(path.read_text(encoding="utf-8"), path.name), schema())


@pytest.mark.parametrize(
    "wrong", [{"model": 3}, {"daat": "x"}, {"settings": [{"levels": [0.5]}]}, {"lm": {"batch_size": "four"}}]
)
def test_the_schema_finds_mistakes(wrong):
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": "m", "suites": ["mmlu"], **wrong}, schema())


def test_the_template_names_every_key():
    from kick.config import Grid, LMSpec, SuiteSpec, SweepConfig
    from kick.sweep.executors.spec import ExecutorSpec

    template = read_yaml((REPOSITORY / "configs/template.yaml").read_text(encoding="utf-8"), "template.yaml")

    def keys(part):
        return {key for entry in template[part] if isinstance(entry, dict) for key in entry}

    assert template.keys() == SweepConfig.model_fields.keys()
    assert keys("settings") == Grid.model_fields.keys()
    assert keys("suites") == SuiteSpec.model_fields.keys()
    for part, spec in (("calibration", CalibrationSpec), ("lm", LMSpec), ("executor", ExecutorSpec)):
        assert template[part].keys() == spec.model_fields.keys(), part


def test_a_suite_may_have_rows_of_its_own(tmp_path, tiny_model):
    from kick.sweep.plan import make_plan

    (tmp_path / "wiki.test.raw").write_text("It rained in the night. " * 40)
    text = f"""
model: {tiny_model}
data: embedded
suites:
  - {{suite: perplexity, label: a}}
  - {{suite: perplexity, label: b, data: {tmp_path}}}
"""
    a, b = make_plan(load(write(tmp_path, text))).suites
    assert (a.source, b.source) == ("embedded", str(tmp_path))
    assert b.examples[0].content["text"].startswith("It rained in the night.")
