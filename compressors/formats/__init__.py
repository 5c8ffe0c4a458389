"""Checkpoints written by other programs, made plain: what each format stores becomes weights, grids and adapters.

    files.py       configuration and tensors from a directory, without running anything that is in it
    quantized.py   packed codes (GPTQ, AWQ, compressed-tensors) -> weights on grids
    slorb.py       AST's low-rank branch -> adapters
    gpt2.py        nanoGPT's orientation, in which AST's GPT-2 is trained
    llama.py       the names and shapes that Sheared LLaMA and LLM-Pruner leave behind
    build.py       the model that the tensors are for

Each step takes a `Foreign` and changes it in place; what it had to put right it tells to `notes`.
"""
