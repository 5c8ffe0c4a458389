"""One compression by llm-compressor, in an interpreter of its own that has llmcompressor and not kick.

    PEER_PYTHON benchmarks/peers/llmcompressor_run.py '{"model": DIR, "tokens": FILE, "out": DIR, ...}'

Reads calibration tokens [n, s] from FILE (safetensors), writes the compressed weights in dense form to DIR, and prints
one line of JSON: wall and CPU seconds and peak resident bytes of the compression alone.
"""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def modifier(job):
    if job["method"] in ("wanda", "sparsegpt"):
        from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

        kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[job["method"]]
        pattern = job["level"] if ":" in job["level"] else "0:0"
        sparsity = 0.5 if ":" in job["level"] else float(job["level"])
        return kind(sparsity=sparsity, mask_structure=pattern, targets=["Linear"], ignore=["re:.*lm_head"])
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {
        "num_bits": int(job["level"]),
        "type": "int",
        "symmetric": job["symmetric"],
        "strategy": "group",
        "group_size": job["group_size"],
    }
    return GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        actorder="static" if job["act_order"] == "static" else None,
    )


def main():
    job = json.loads(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    names = [name for name, _ in model.named_parameters()]
    tokens = load_file(job["tokens"])["tokens"]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    start, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=modifier(job),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
        batch_size=job["batch"],
    )
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    save_file({name: state[name].contiguous() for name in names}, out / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        shutil.copy(Path(job["model"]) / name, out / name)
    print("RESULT " + json.dumps({"wall": wall, "cpu": cpu, "peak": peak}))


if __name__ == "__main__":
    main()
