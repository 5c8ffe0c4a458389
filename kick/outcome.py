"""What the stages of a setting do to a model: each is carried out, measured, and held to what it is called."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from kick import adapters
from kick.blocks import Decoder, find_decoder
from kick.calibration import Calibration
from kick.compressor import Compressor, LayerwiseCompressor, Progress
from kick.errors import KickError
from kick.levels import Joint, Level, Pattern, Sparsity, pruning
from kick.measured import STRAY_ZEROS, Measured, Structure, measure
from kick.settings import Stage
from kick.streaming import resident


@dataclass
class Step:
    """A stage ready to run: its compressor, parameters checked, and its level."""

    stage: Stage
    compressor: Compressor
    level: Level | None


@dataclass
class Outcome:
    """What the stages of a setting did to a model, as it adds up from stage to stage.

    `measured` is what the last stage left, under the patterns and grids of all.
    """

    measured: Measured | None  # None before a stage that brings a model of its own
    warnings: list[str] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    structure: Structure = field(default_factory=Structure)
    layers_of_stages: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    masks: list[dict[str, np.ndarray]] = field(default_factory=list)  # of each stage: where it left zeros, as bits

    def carry_out(self, step: Step, model: nn.Module, calibration: Calibration | None, progress: Progress) -> nn.Module:
        """Run one stage on `model`, and refuse a result that is not what the stage is called."""
        compressor = step.compressor
        try:
            model = compressor.compress(model, step.level, calibration, progress=progress)
        except KickError:
            raise
        except Exception as error:  # a plugin may raise anything
            raise KickError(
                f"{step.stage} failed: {type(error).__name__}: {error}", "--debug shows the whole error."
            ) from error
        if not isinstance(model, nn.Module):
            raise KickError(f"{step.stage} gave {model!r}.", "`compress` gives the model, also where it changed it.")
        decoder = find_decoder(model)
        levels = compressor.asked_levels(step.level, decoder)
        patterns = {name: pattern for name, level in levels.items() if isinstance(pattern := pruning(level), Pattern)}
        known = self.structure
        head = decoder.head.name if decoder.head is not None else None
        known.head |= head in levels or head in compressor.grids or head in compressor.stored_bits
        # a later pruner leaves a grid or breaks it: the last measurement tells
        known.patterns |= patterns | compressor.patterns
        known.grids |= compressor.grids
        known.adapters = adapters.attached(model)
        touched = compressor.layers if isinstance(compressor, LayerwiseCompressor) else list(known.stored_bits)
        for name in touched:  # no longer what was stored
            known.stored_bits.pop(name, None)
        known.stored_bits |= compressor.stored_bits
        after = measure(model, decoder, known)
        before, self.measured = self.measured or after, after
        own = {
            "pattern_violations": _count(after, patterns, "pattern_violations"),
            "grid_violations": _count(after, compressor.grids, "grid_violations"),
        }
        check_reached(step, levels, before, after, own, compressor.layers)
        check_parameters(step, after)
        for record, masks in zip(self.stages, self.masks, strict=True):
            record["mask_violations"] = revived(decoder, masks)
        if isinstance(compressor, LayerwiseCompressor):
            pruned = {name for name, level in levels.items() if isinstance(pruning(level), Sparsity | Pattern)}
        else:  # free in what it prunes: whatever it left with zeros
            pruned = {name for name, layer in after.layers.items() if layer["sparsity"] > STRAY_ZEROS}
        self.masks.append(zero_masks(decoder, pruned))
        self.warnings += compressor.warnings
        self.layers |= compressor.layers  # what the last stage did to each; of chains `compare` keeps all
        self.layers_of_stages.append(compressor.layers)
        self.stages.append(
            {
                **step.stage.model_dump(mode="json"),
                "sparsity": after.sparsity,
                **own,
                "mask_violations": 0,
                "facts": compressor.facts,
            }
        )
        return model

    def compare(self, steps: list[Step]) -> None:
        """Warn of what a later stage undid, and of weights that no stage could reach; of a chain say what each did."""
        measured = self.measured
        assert measured is not None
        if len(self.stages) > 1:
            for record, layers in zip(self.stages, self.layers_of_stages, strict=True):
                record["layers"] = layers  # its errors are against what it was given
        for step, record in zip(steps, self.stages, strict=True):
            if count := record["mask_violations"]:
                self.warnings.append(
                    f"{count} weights that {step.stage} had made zero are no longer zero. It reached a sparsity of "
                    f"{record['sparsity']:.4f}; after all stages it is {measured.sparsity:.4f}."
                )
        if measured.violations:
            self.warnings.append(f"{measured.violations} groups of the pattern keep more weights than they may.")
        if measured.grid_violations:
            self.warnings.append(f"{measured.grid_violations} weights are no longer on the grid that they were put on.")
        if steps and measured.uncovered:
            self.warnings.append(
                f"{len(measured.uncovered)} weights inside the blocks belong to no linear layer and stay dense "
                f"({1 - measured.coverage:.1%} of the blocks' weights): {', '.join(measured.uncovered[:4])}"
                + (", ..." if len(measured.uncovered) > 4 else ".")
            )


def zero_masks(decoder: Decoder, names: set[str]) -> dict[str, np.ndarray]:
    """Where the weights of the linears called `names` are zero, one bit each."""
    masks: dict[str, np.ndarray] = {}
    for block in decoder.blocks:
        if wanted := [linear for linear in block.linears if linear.name in names]:
            with resident(block.module):
                masks |= {linear.name: np.packbits((linear.weight == 0).cpu().numpy()) for linear in wanted}
    return masks


def revived(decoder: Decoder, masks: dict[str, np.ndarray]) -> int:
    """How many weights that `masks` says were zero are not zero now."""
    now = zero_masks(decoder, set(masks))
    return sum(
        int(np.bitwise_count(mask & ~now[name]).sum())
        for name, mask in masks.items()
        if name in now and now[name].shape == mask.shape  # else another stage took the linear apart
    )


def _count(measured: Measured, names: Iterable[str], key: str) -> int:
    return sum(measured.layers.get(name, {}).get(key, 0) for name in names)


def check_reached(
    step: Step,
    levels: dict[str, Level],
    before: Measured,
    after: Measured,
    own: dict[str, int],
    layers: dict[str, dict[str, Any]],
) -> None:
    """Refuse to write a checkpoint that is not what it is called.

    Sparsity may differ by the rounding of one row, of each linear whose level is known, else of all together. On top
    may come zeros that were there before, columns of dead inputs and, at joint levels, weights rounded to zero. `own`:
    violations of the patterns and grids that this stage itself set; `layers`: what the compressor told of each linear.
    """
    stage = step.stage
    if after.broken:
        raise KickError(
            f"{stage}: {after.broken[0]} holds values that are not finite.",
            "The compressor is at fault, or the source.",
        )
    if broken := own["pattern_violations"]:
        raise KickError(f"{stage}: {broken} groups keep more weights than they may.", _AT_FAULT)
    if broken := own["grid_violations"]:
        raise KickError(f"{stage}: {broken} weights are not on their grid.", _AT_FAULT)
    reached = [
        (
            name,
            asked,
            after.layers[name]["sparsity"],
            _excess(name, level, before, layers),
            min(after.layers[name]["shape"]),
        )
        for name, level in levels.items()
        if isinstance(asked := pruning(level), Sparsity)
    ]
    removed = step.compressor.expected_parameters is not None  # a sparsity is then a share of parameters, not of zeros
    if not levels and not removed and isinstance(asked := pruning(step.level), Sparsity):
        shortest = min(min(layer["shape"]) for layer in after.layers.values())
        reached = [("the model", asked, after.sparsity, before.sparsity, shortest)]
    for name, asked, found, had, shortest in reached:
        if not asked.fraction - 1 / shortest <= found <= asked.fraction + 1 / shortest + had:
            raise KickError(f"{stage}: {name} has a sparsity of {found:.4f} where {asked} was asked.", _AT_FAULT)


def check_parameters(step: Step, after: Measured) -> None:
    """Refuse a model that has other parameters than its compressor says."""
    expected = step.compressor.expected_parameters
    found = after.parameters - sum(layer.get("adapter_parameters", 0) for layer in after.layers.values())
    if expected is not None and found != expected:
        raise KickError(f"{step.stage}: {found:,} parameters where {expected:,} were meant.", _AT_FAULT)


def _excess(name: str, level: Level, before: Measured, layers: dict[str, dict[str, Any]]) -> float:
    """By how much the sparsity of a linear may exceed what was asked."""
    if isinstance(level, Joint):
        return 1.0
    if name not in before.layers:  # the head, which was not counted before
        return 0.0
    dead = layers.get(name, {}).get("dead_inputs", 0) / before.layers[name]["shape"][1]
    return before.layers[name]["sparsity"] + dead


_AT_FAULT = "The compressor is at fault: kick.testing.check_compressor tries it on tiny models."
