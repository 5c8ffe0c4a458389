"""Supervised tuning: train a model, or one that was just compressed, on instruction pairs or on plain text.

    kick compress MODEL "llm_pruner@0.2 > tune" --out DIR --param tune.data=alpaca.jsonl
    kick compress MODEL tune --out DIR --param data=pairs.jsonl --param rank=0

LoRA through `peft` by default (Hu et al., arXiv 2106.09685), as LLM-Pruner recovers (arXiv 2305.11627, section 3.3),
merged into the weights or kept beside them; `rank: 0` trains all weights, as Sheared LLaMA is tuned (arXiv 2310.06694,
section 3.3). Of a pair only the answer is learned. Weights that are zero stay zero unless asked otherwise.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kick import adapters
from kick.adapters import LowRank
from kick.blocks import Linear, find_decoder, parameter_count
from kick.calibration import Calibration, is_hub
from kick.compressor import Compressor, Cost, Knob, Progress, no_progress
from kick.errors import ConfigError
from kick.extras import import_extra
from kick.levels import Level
from kick.measured import is_pruned

from .ast.sparse import Masked
from .training.figures import keep
from .training.loop import Batches, train
from .training.objective import Objective
from .training.pairs import Pairs, find_pairs
from .training.spec import Training
from .training.text import TextData


class Tune(Compressor):
    name = "tune"
    knob = Knob.NONE

    class Params(Training, TextData):
        rank: int = Field(default=8, ge=0, description="of LoRA; 0: all weights are trained")
        alpha: float = Field(default=16, gt=0, description="LoRA's changes are scaled by alpha / rank")
        dropout: float = Field(default=0.05, ge=0, lt=1, description="before LoRA's branches")
        merge: bool = Field(default=True, description="false: LoRA's branches stay beside the weights, as adapters")
        keep_zeros: bool = Field(default=True, description="pruned weights stay zero")

    def inputs(self) -> dict[str, str]:
        return {"data": self.params.fingerprint()}

    def trained_on(self) -> Iterable[str]:
        data = self.params.data
        on_hub = isinstance(data, str) and is_hub(data)
        return () if on_hub or find_pairs(data) is not None else self.params.beginnings()

    def remarks(self) -> Iterable[str]:
        return self.params.remarks()

    def cost(self, level: Level | None, skeleton: nn.Module) -> Cost:
        return self.params.cost(parameter_count(skeleton), trained=0 if self.params.rank else None)

    def compress(
        self,
        model: nn.Module,
        level: Level | None,
        calibration: Calibration | None,
        *,
        progress: Progress = no_progress,
    ) -> nn.Module:
        params = self.params
        llm: Any = model
        dtype, device = llm.dtype, str(llm.device)
        llm = llm.float()
        linears = find_decoder(llm).linears
        masks = {linear: linear.weight != 0 for linear in linears if params.keep_zeros and is_pruned(linear.weight)}
        if params.rank and not params.merge:
            adapters.refuse_attached(llm, "tune with merge: false")
        if params.rank and params.merge and masks:
            raise ConfigError(
                "tune merges LoRA into weights of which some must stay zero: what was trained would be lost there.",
                "Set rank: 0 (all weights but the zeros), merge: false (branches beside them) or keep_zeros: false.",
            )
        batches = self._batches()
        torch.manual_seed(self.seed)  # LoRA begins with weights by lot, the same on every process
        tuned = add_lora(llm, linears, params) if params.rank else _train_all(llm, masks)
        with self.work_folder() as folder:
            history = train(
                Objective(tuned),
                batches,
                params,
                folder,
                seed=self.seed,
                device=device,
                progress=progress,
                what=self.name,
            )
            keep(history, folder / "kept")
        self.facts = {"training": history.totals()}
        if isinstance(batches, Pairs) and batches.left_out:
            self.warn(f"{batches.left_out} pairs have no answer within {params.sequence_length} tokens; left out.")
        llm = take_lora(tuned, params.merge) if params.rank else _freeze(llm, masks)
        return llm.requires_grad_(False).to(dtype).eval()

    def _batches(self) -> Batches:
        params = self.params
        if (pairs := find_pairs(params.data)) is not None:
            if unread := sorted(params.model_fields_set & {"weights", "text_field"}):
                raise ConfigError(f"tune.{unread[0]} beside instruction pairs.", "It is about text: leave it out.")
            return Pairs(pairs, self.tokenizer, params.sequence_length, self.seed)
        return params.open(self.tokenizer, params.sequence_length, self.seed)


def add_lora(model: Any, linears: list[Linear], params: Any) -> Any:
    """`model` inside peft's, with branches beside all of `linears` that begin as zero."""
    peft = import_extra("peft", "train", "tune with a rank")
    config = peft.LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules=[linear.name for linear in linears],
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


@torch.no_grad()
def take_lora(tuned: Any, merge: bool) -> Any:
    """The model without peft around it: its branches merged into the weights, or kept as kick's adapters."""
    if merge:
        return tuned.merge_and_unload()
    found = {}
    for name, module in tuned.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            down, up = (part["default"].weight for part in (module.lora_A, module.lora_B))
            found[name] = LowRank(down.detach().clone(), up.detach() * module.scaling["default"])
    model = tuned.unload()
    adapters.attach(model, found)
    return model


def _train_all(model: Any, masks: dict[Linear, Tensor]) -> Any:
    """All weights learn, but those that `masks` says are zero."""
    model.requires_grad_(True)
    for linear, mask in masks.items():
        laid_out = mask.T.contiguous() if linear.transposed else mask
        parametrize.register_parametrization(linear.module, "weight", Masked(laid_out, through=False))
    return model


def _freeze(model: Any, masks: dict[Linear, Tensor]) -> Any:
    for linear in masks:
        parametrize.remove_parametrizations(linear.module, "weight", leave_parametrized=True)
    return model
