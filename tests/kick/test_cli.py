import errno
import json
import shutil
import signal
import subprocess
import sys

import pytest

from kick import __version__, cli, plugins


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from kick import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'transformers', 'numpy', 'pydantic', 'yaml', 'matplotlib')\n"
        "print('HEAVY', [m for m in heavy if m in sys.modules])"
    )
    assert run_python(code).strip().endswith("HEAVY []")


def test_import_kick_works_alone():
    assert run_python("import kick; print(kick.__version__)").strip() == __version__


def test_kick_imports_neither_folder():
    code = (
        "import sys, pkgutil, importlib, kick\n"
        "for m in pkgutil.walk_packages(kick.__path__, 'kick.'): importlib.import_module(m.name)\n"
        "print([m for m in sys.modules if m.startswith(('kick_compressors', 'kick_tasks'))])"
    )
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize("what", ["compressors", "suites", "models", "lms"])
def test_lists_are_json_on_request(what, capsys):
    assert cli.main(["list", what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    names = {row["name"] for row in rows}
    assert (
        names
        >= {
            "compressors": {"magnitude", "wanda"},
            "suites": {"factoid_qa", "mmlu", "perplexity"},
            "models": {"smollm2-135m"},
            "lms": {"fast"},
        }[what]
    )
    assert all(row["description"] for row in rows)
    assert cli.main(["list", what]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in names)


def test_no_command_prints_help_and_is_wrong_usage(capsys):
    assert cli.main([]) == 2
    assert "sweep" in capsys.readouterr().out


def test_compress_and_inspect(tiny_model, tmp_path, capsys):
    out = tmp_path / "checkpoint"
    command = ["compress", str(tiny_model), "wanda@2:4", "--out", str(out), "--param", "calibration.samples=2",
               "--param", "calibration.sequence_length=32", "--json"]  # fmt: skip
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == 0.5
    assert cli.main(command) == 2  # it does not overwrite
    assert "is not empty" in capsys.readouterr().err
    assert cli.main(["inspect", str(out)]) == 0
    assert "verified" in capsys.readouterr().out
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert cli.main(["inspect", str(out), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [
        "model.safetensors has changed: its SHA-256 is not the recorded one"
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compress", "MODEL", "wanda@0.5", "--param", "calibration.sample=2"], "unknown key 'sample'"),
        (["compress", "MODEL", "wanda@0.5", "--param", "calibration.samples"], "has no '='"),
        (["compress", "MODEL", "wanda@0.5", "--param", "x=1"], "wanda takes no parameters"),
        (["compress", "MODEL", "wand@0.5"], "Did you mean 'wanda'"),
        (["compress", "MODEL", "wanda"], "no level was given"),
        (["compress", "MODEL", "wanda@0.5", "--param", "calibration.samples=100000"], "tokens; 'embedded' holds"),
        (["evaluate", "MODEL", "--suite", "mmul"], "Did you mean 'mmlu'"),
        (["evaluate", "MODEL", "--suite", "mmlu,factoid_qa", "--param", "text=c4"], "unknown key 'text'"),
        (["evaluate", "MODEL", "--suite", "mmlu", "--param", "perplexity.text=c4"], "no suite 'perplexity' is asked"),
        (["evaluate", "MODEL", "--suite", "mmlu", "--data", "embedded", "--lm", "vlm"], "no lm named 'vlm'"),
        (["evaluate", "MODEL", "--suite", "factoid_qa", "--param", "shot_seed=-1"], "greater than or equal to 0"),
        (["evaluate", "BROKEN", "--suite", "mmlu", "--data", "embedded"], "cannot be read"),
        (["evaluate", "PACKED", "--suite", "mmlu", "--data", "embedded"], "compressor: external"),
        (["compress", "BAD.gguf", "magnitude@0.5"], "cannot be loaded"),
    ],
)
def test_wrong_arguments_write_nothing(tiny_model, tmp_path, capsys, arguments, says):
    places = {"MODEL": tiny_model}
    for name in ("BROKEN", "PACKED"):
        places[name] = shutil.copytree(tiny_model, tmp_path / name)
    weights = places["BROKEN"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    config = json.loads((tiny_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (places["PACKED"] / "config.json").write_text(json.dumps(config))
    places["BAD.gguf"] = tmp_path / "BAD.gguf"
    places["BAD.gguf"].write_bytes(b"GGUFxxxxxx")
    arguments = [str(places.get(part, part)) for part in arguments]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_was_cut_is_missed_before_a_run_is_begun(tiny_model, tmp_path, capsys):
    made, out = tmp_path / "made", tmp_path / "run"
    assert cli.main(["compress", str(tiny_model), "magnitude@0.5", "--out", str(made)]) == 0
    weights = made / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert cli.main(["evaluate", str(made), "--suite", "mmlu", "--data", "embedded", "--out", str(out)]) == 2
    assert "model.safetensors has" in capsys.readouterr().err
    assert not out.exists()


def test_a_checkpoint_of_a_plugin_is_asked_without_the_plugin(tiny_model, tmp_path, monkeypatch, capsys):
    code = """
from kick.compressor import Knob, LayerwiseCompressor
class Mine(LayerwiseCompressor):
    name = "mine"
    knob = Knob.SPARSITY
    def solve(self, weight, statistic, level):
        return weight * (weight.abs() >= weight.abs().quantile(level.fraction))
"""
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.setattr(plugins, "_files", [])
    monkeypatch.setattr(plugins, "_from_files", {plugins.COMPRESSORS: {}, plugins.SUITES: {}})
    plugin = ["--plugin", str(tmp_path / "mine.py")]
    assert cli.main(["compress", str(tiny_model), "mine@0.5", "--out", str(tmp_path / "made"), *plugin]) == 0
    monkeypatch.setattr(plugins, "_files", [])
    monkeypatch.setattr(plugins, "_from_files", {plugins.COMPRESSORS: {}, plugins.SUITES: {}})
    ask = ["evaluate", str(tmp_path / "made"), "--suite", "mmlu", "--data", "embedded", "--limit", "2"]
    assert cli.main([*ask, "--out", str(tmp_path / "run")]) == 0
    assert "mine@0.5" in capsys.readouterr().out


def test_what_the_system_refuses_is_said_with_what_to_do(tmp_path, capsys, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "sweep.yaml")

    monkeypatch.setattr(cli, "_command", lambda name: refused)
    assert cli.main(["list", "models"]) == 2
    assert capsys.readouterr().err == (
        "kick: error: Permission denied: sweep.yaml\n"
        "  Give yourself the permission (chmod), or name another file or folder.\n"
    )


def test_parameters_reach_the_suites_that_know_them(tiny_model, tmp_path):
    arguments = ["evaluate", str(tiny_model), "--suite", "factoid_qa,mmlu", "--data", "embedded", "--limit", "4",
                 "--param", "shots=1", "--param", "mmlu.format=cloze", "--param", "max_new_tokens=4"]  # fmt: skip
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    suites = json.loads((tmp_path / "out/run.json").read_text())["suites"]
    assert (suites["factoid_qa"]["params"]["shots"], suites["factoid_qa"]["params"]["max_new_tokens"]) == (1, 4)
    assert (suites["mmlu"]["params"]["shots"], suites["mmlu"]["params"]["format"]) == (1, "cloze")


def test_report_of_something_else(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "typo"):
        assert cli.main(["report", str(folder)]) == 2
        assert "is not a run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run.json").write_text("{")
    for command in (["report"], ["judge", "--judge", "m", "--base-url", "http://127.0.0.1:9/v1"]):
        assert cli.main([command[0], str(tmp_path), *command[1:]]) == 2
        assert "run.json is damaged" in capsys.readouterr().err


def test_a_plugin_that_cannot_be_loaded_is_listed_as_such(capsys, monkeypatch):
    def broken():
        raise ImportError("planted")

    plugin = plugins.Plugin("broken", "elsewhere", "1", broken)
    monkeypatch.setattr(plugins, "_from_files", {plugins.COMPRESSORS: {"broken": plugin}, plugins.SUITES: {}})
    assert cli.main(["list", "compressors"]) == 0
    text = capsys.readouterr().out
    assert "wanda" in text
    assert "cannot be loaded" in text
    assert cli.main(["doctor"]) == 1
    assert "NOT LOADED: broken" in capsys.readouterr().out


def test_doctor_is_not_given_a_model_for_nothing(capsys):
    assert cli.main(["doctor", "smollm2-135m"]) == 2
    assert "a model is named, but no LM to compare on it" in capsys.readouterr().err


def test_a_number_that_is_none(capsys):
    for text in ("abc", "0", "-3", "2.5"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["evaluate", "m", "--suite", "mmlu", "--out", "o", f"--limit={text}"])
        assert f"'{text}' is not a positive whole number" in capsys.readouterr().err


def test_a_part_of_what_was_given_whole(tiny_model, tmp_path, capsys):
    asked = ["--suite", "perplexity", "--data", "embedded", "--lm", "server", "--param", "lm.models=x"]
    asked += ["--param", "lm.models.dense=y", "--out", str(tmp_path / "run")]
    assert cli.main(["evaluate", str(tiny_model), *asked]) == 2
    assert "--param lm.models.dense: 'models' was given a value before" in capsys.readouterr().err


def test_on_and_off_reach_a_suite(tiny_model, tmp_path):
    asked = ["--suite", "factoid_qa", "--data", "embedded", "--limit", "2", "--param", "max_new_tokens=2"]
    out = tmp_path / "run"
    assert cli.main(["evaluate", str(tiny_model), *asked, "--param", "chat_template=off", "--out", str(out)]) == 0
    assert json.loads((out / "run.json").read_text())["suites"]["factoid_qa"]["params"]["chat_template"] == "off"


def test_debug_shows_the_traceback_and_changes_nothing_else(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path), "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "kick: error: " in said
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_what_nobody_foresaw_is_said_in_a_line(capsys, monkeypatch):
    def broken(options):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(cli, "_command", lambda name: broken)
    assert cli.main(["list", "models"]) == 1
    assert capsys.readouterr().err == (
        "kick: error: ZeroDivisionError: planted\n  A fault of kick, or of a plugin: --debug shows where.\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_process_ends_it_as_ctrl_c_does(number, capsys, monkeypatch):
    before = signal.signal(number, signal.SIG_DFL)
    ended = []

    def work(options):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # again, while things are put away
            ended.append(True)

    monkeypatch.setattr(cli, "_command", lambda name: work)
    try:
        assert cli.main(["list", "models"]) == 130
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert ended
    assert "interrupted" in capsys.readouterr().err


PLUGIN = (
    "from kick.compressor import Compressor, Knob\nclass Mine(Compressor):\n    name = {name!r}\n    knob = Knob.NONE\n"
)
SUITE = (
    "from kick.suite import Metric, Suite\nclass Mine(Suite):\n    name = 'mine'\n    metrics = {metrics}\n"
    "    def examples(self, source): raise ValueError('planted')\n    def answer(self, lm, examples): yield from ()\n"
)
METHOD = "    def compress(self, model, level, calibration, *, progress=None):\n        return model\n"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (None, "no plugin file"),
        ("raise RuntimeError('planted')", "fails: RuntimeError('planted')"),
        ("x = 1", "defines no compressor and no suite"),
        (PLUGIN.format(name="wanda") + METHOD, "which llm-kick already provides"),
        (PLUGIN.format(name="") + METHOD, "has no name"),
        (PLUGIN.format(name="mine").replace("    knob = Knob.NONE\n", "") + METHOD, "Mine of mine.py has no `knob`"),
        (
            PLUGIN.format(name="mine").replace("Knob.NONE", "'sparsity'") + METHOD,
            "knob of Mine in mine.py is 'sparsity'",
        ),
        (SUITE.format(metrics="Metric('a', value='b')"), "metrics of Mine in mine.py is Metric("),
        (PLUGIN.format(name="abstract"), "defines no compressor and no suite"),
    ],
)
def test_a_wrong_plugin_file_says_so(tmp_path, capsys, monkeypatch, code, says):
    monkeypatch.setattr(plugins, "_from_files", {plugins.COMPRESSORS: {}, plugins.SUITES: {}})
    path = tmp_path / "mine.py"
    if code is not None:
        path.write_text(code)
    assert cli.main(["list", "compressors", "--plugin", str(path)]) == 2
    assert says in capsys.readouterr().err


def test_a_plugin_that_fails_as_it_is_asked_is_named(tmp_path, capsys, monkeypatch, tiny_model):
    monkeypatch.setattr(plugins, "_from_files", {plugins.COMPRESSORS: {}, plugins.SUITES: {}})
    monkeypatch.setattr(plugins, "_files", [])
    (tmp_path / "suite.py").write_text(SUITE.format(metrics="()"))
    asked = ["--suite", "mine", "--data", "embedded", "--plugin", str(tmp_path / "suite.py")]
    assert cli.main(["evaluate", str(tiny_model), *asked, "--out", str(tmp_path / "run")]) == 2
    assert "suite 'mine' fails as it reads embedded: ValueError: planted." in capsys.readouterr().err
    for number, (body, says) in enumerate(
        [
            (METHOD.replace("return model", "return None"), "gave None"),
            ("    def __init__(self, params):\n        pass\n" + METHOD, "Mine cannot be made: "),
        ]
    ):
        path = tmp_path / f"compressor{number}.py"
        path.write_text(PLUGIN.format(name=f"mine{number}") + body)
        asked = ["compress", str(tiny_model), f"mine{number}", "--plugin", str(path), "--out", str(tmp_path / "out")]
        assert cli.main(asked) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_suite_asked_twice_is_wrong_usage(tiny_model, tmp_path, capsys):
    assert cli.main(["evaluate", str(tiny_model), "--suite", "mmlu,mmlu", "--out", str(tmp_path / "run")]) == 2
    assert "--suite names 'mmlu' twice" in capsys.readouterr().err


def test_a_plugin_file_can_be_named_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plugins, "_from_files", {plugins.COMPRESSORS: {}, plugins.SUITES: {}})
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN.format(name="mine") + METHOD)
    for _ in "ab":
        assert cli.main(["list", "compressors", "--plugin", str(path), "--json"]) == 0
        assert "mine" in capsys.readouterr().out
