import pytest
from hypothesis import given
from hypothesis import strategies as st

from kick.calibration import CalibrationSpec
from kick.config import Grid
from kick.errors import LevelError
from kick.levels import Bits, Knob, Pattern, Shape, Sparsity, parse_level
from kick.settings import Setting, digest, split_stage

BOTH = Knob.SPARSITY | Knob.PATTERN


def test_levels_are_parsed_for_the_knob():
    assert parse_level("0.5", BOTH) == Sparsity(fraction=0.5)
    assert parse_level(".25", BOTH) == Sparsity(fraction=0.25)
    assert parse_level("2:4", BOTH) == Pattern(keep=2, of=4)
    assert parse_level("4", Knob.BITS) == Bits(width=4)
    assert parse_level("1.3B", Knob.SHAPE) == Shape(name="1.3B")
    assert parse_level("", Knob.NONE) is None


@pytest.mark.parametrize(
    ("text", "knob", "says"),
    [
        ("0", BOTH, "not between 0 and 1"),
        ("1", BOTH, "not between 0 and 1"),
        ("-0.5", BOTH, "not between 0 and 1"),
        ("50", BOTH, "not between 0 and 1"),
        ("3:2", BOTH, "keeps 3 of every 2"),
        ("4:4", BOTH, "keeps 4 of every 4"),
        ("0:4", BOTH, "keeps 0 of every 4"),
        ("0.5,2:4", BOTH, "a sparsity together with a pattern"),
        ("2:4+0.5", BOTH, "a sparsity together with a pattern"),
        ("half", BOTH, "not one that this compressor takes"),
        ("nan", BOTH, "not one that this compressor takes"),
        ("", BOTH, "no level was given"),
        ("2:4", Knob.BITS, "not one that this compressor takes"),
        ("17", Knob.BITS, "not a usable number of bits"),
        ("0.5", Knob.NONE, "takes none"),
    ],
)
def test_an_impossible_level_says_what_is_wrong(text, knob, says):
    with pytest.raises(LevelError) as error:
        parse_level(text, knob)
    assert says in str(error.value)
    assert error.value.hint


@given(st.floats(min_value=1e-3, max_value=0.999).map(lambda x: round(x, 3)))
def test_a_printed_sparsity_parses_to_itself(fraction):
    level = Sparsity(fraction=fraction)
    assert parse_level(str(level), BOTH) == level


def test_settings_are_named_and_told_apart():
    setting = Setting(compressor="wanda", level="0.5")
    assert setting.name == "wanda@0.5"
    assert Setting(compressor="dense").name == "dense"
    assert setting.model_copy(update={"label": "mine"}).name == "mine"
    same, other = Setting(level="0.5", compressor="wanda"), Setting(compressor="wanda", level="0.5", seed=1)
    assert digest(setting.model_dump()) == digest(same.model_dump()) != digest(other.model_dump())


def test_splitting_a_setting():
    assert split_stage("wanda@2:4") == ("wanda", "2:4")
    assert split_stage("dense") == ("dense", "")
    for text in ("@0.5", "wanda@0.5@2:4"):
        with pytest.raises(LevelError):
            split_stage(text)


def test_values_that_end_alike_are_told_apart_by_more_of_their_paths():
    grid = Grid(
        compressor="wanda", levels=("0.5",), vary={"calibration.source": ("/m/c4/train.jsonl", "/m/wiki/train.jsonl")}
    )
    settings = grid.settings(CalibrationSpec())
    assert [setting.name for setting in settings] == ["wanda@0.5 source=c4/train", "wanda@0.5 source=wiki/train"]
    assert {setting.method for setting in settings} == {"wanda"}


def test_parameters_that_end_alike_are_no_part_of_the_methods_name():
    grid = Grid(compressor="mine", levels=("0.5",), vary={"calibration.samples": (8,), "samples": (64,)})
    (setting,) = grid.settings(CalibrationSpec())
    assert setting.name == "mine@0.5 samples=8 samples=64"
    assert setting.method == "mine"
    (single,) = Grid(compressor="mine", vary={"data": ("./calib.jsonl",)}).settings(CalibrationSpec())
    assert single.name == "mine data=calib"
