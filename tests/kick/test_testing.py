"""The conformance kit: every built-in passes, and each planted fault is found by the check that is meant for it."""

from importlib.metadata import entry_points

import pytest
import torch
from kick_compressors.llm_pruner.compressor import LLMPruner
from kick_compressors.magnitude import Magnitude
from kick_compressors.masks import keep_largest

from kick.compressor import Compressor, Knob
from kick.errors import LevelError
from kick.levels import Pattern, Sparsity
from kick.testing import ARCHITECTURES, ConformanceError, check_compressor, compressor_checks

BUILT_IN = sorted(entry.name for entry in entry_points(group="kick.compressors") if entry.dist.name == "llm-kick")
PARAMS = {
    "awq": {"group_size": 16},
    "gptq": {"group_size": 16},
    "rtn": {"group_size": 16},
    "sparsegpt": {"group_size": 16},
}
ELSEWHERE = {"external", "gptqmodel", "llmcompressor"}  # their work is done elsewhere: they have tests of their own
FEW_STEPS = {"steps": 3, "batch_size": 2, "sequence_length": 32}
TRAINED = {
    "ast": ({**FEW_STEPS, "distillation": 0.5}, None, ARCHITECTURES),
    "tune": ({**FEW_STEPS, "rank": 0}, None, ARCHITECTURES),
    "sheared": ({"pruning": FEW_STEPS, "continuing": FEW_STEPS}, ["1x16x24x2"], ["llama"]),
}


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in ELSEWHERE | TRAINED.keys() | {"llm_pruner"}])
def test_every_built_in_passes(name):
    (entry,) = entry_points(group="kick.compressors", name=name)
    check_compressor(entry.load(), PARAMS.get(name))


@pytest.mark.parametrize("name", TRAINED)
def test_what_trains_passes(name, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "What is learned here is not much, but it is learned."}\n' * 40)
    params, levels, architectures = TRAINED[name]
    (entry,) = entry_points(group="kick.compressors", name=name)
    check_compressor(entry.load(), {**params, "data": str(tmp_path / "text.jsonl")}, levels, architectures)


def test_what_takes_parameters_away_passes():
    check_compressor(LLMPruner, {"uniform": True}, ["0.2"], ["llama"])


class WrongLevel(Magnitude):
    def solve(self, weight, statistic, level):
        if isinstance(level, Sparsity):
            level = Sparsity(fraction=level.fraction * 0.8)
        return super().solve(weight, statistic, level)


class ViolatedPattern(Magnitude):
    def solve(self, weight, statistic, level):
        if isinstance(level, Pattern):
            level = Sparsity(fraction=1 - level.keep / level.of)  # as many zeros, but anywhere
        return super().solve(weight, statistic, level)


class NotDeterministic(Magnitude):
    def solve(self, weight, statistic, level):
        return weight * keep_largest(torch.rand_like(weight), level, dim="matrix")


class NotFinite(Magnitude):
    def solve(self, weight, statistic, level):
        pruned = super().solve(weight, statistic, level)
        pruned[pruned == 0] = torch.nan if isinstance(level, Pattern) else 0.0
        return pruned


class TouchedEmbeddings(Magnitude):
    def compress(self, model, *args, **kwargs):
        model.get_input_embeddings().weight.data[0] += 1
        return super().compress(model, *args, **kwargs)


class LostTie(Magnitude):
    def compress(self, model, *args, **kwargs):
        model = super().compress(model, *args, **kwargs)
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.data.clone())
        return model


class BrokenSave(Magnitude):
    def compress(self, model, *args, **kwargs):
        model = super().compress(model, *args, **kwargs)
        for module in model.modules():  # a mask that is applied in the forward pass, and in no file
            if isinstance(module, torch.nn.LayerNorm) or "RMSNorm" in type(module).__name__:
                module.register_forward_hook(lambda module, args, output: output * 1.5)
        return model


class WrongError(Compressor):
    """Not layer by layer, and careless about what it is given."""

    name = "wrong_error"
    knob = Knob.PATTERN

    def compress(self, model, level, calibration, *, progress=None):
        inner = Magnitude()
        try:
            return inner.compress(model, level, calibration)
        except LevelError as error:
            raise ValueError(error.message) from error


FAULTS = {
    WrongLevel: "reaches the level",
    ViolatedPattern: "keeps the pattern",
    NotDeterministic: "is deterministic",
    NotFinite: "gives finite weights",
    TouchedEmbeddings: "leaves the embeddings alone",
    LostTie: "keeps embeddings and head tied",
    BrokenSave: "survives saving and loading",
    WrongError: "refuses what it cannot do",
}


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_each_planted_fault_is_found(kind):
    failing = set()
    for check in compressor_checks(kind):
        try:
            check.run()
        except ConformanceError:
            failing.add(check.name)
    assert FAULTS[kind] in failing
    assert len(failing) <= 2  # the report points at the fault, not everywhere


class WrongCount(LLMPruner):
    def compress(self, *args, **kwargs):
        model = super().compress(*args, **kwargs)
        self.expected_parameters += 1
        return model


def test_another_number_of_parameters_than_announced_is_found():
    with pytest.raises(ConformanceError, match="fails 1 check") as caught:
        check_compressor(WrongCount, {"uniform": True}, ["0.2"], ["llama"])
    assert "reaches the level" in str(caught.value)


def test_the_error_names_every_failing_check():
    with pytest.raises(ConformanceError, match="LostTie fails") as caught:
        check_compressor(LostTie)
    assert "keeps embeddings and head tied" in str(caught.value)
