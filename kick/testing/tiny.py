"""Models, a tokenizer and calibration text that are made in no time: random weights, a token for each byte."""

from typing import Any

import torch
from torch import nn

from kick.calibration import Calibration, CalibrationSpec

_VOCABULARY = 257  # the bytes, and one token that ends a text


def tiny_model(architecture: str = "llama") -> nn.Module:
    """A random model with two blocks; its embeddings and head are tied. gpt2 stores its weights [in, out]."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "llama": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
        },
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2},
    }[architecture]
    config = AutoConfig.for_model(architecture, vocab_size=_VOCABULARY, tie_word_embeddings=True, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def tiny_tokenizer() -> Any:
    """A token for each byte, and one that ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab={**vocabulary, "</s>": len(vocabulary)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")


def tiny_calibration() -> Calibration:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, _VOCABULARY, (8, 24), generator=generator)
    return Calibration(tokens, "tiny", CalibrationSpec(samples=8, sequence_length=24))
