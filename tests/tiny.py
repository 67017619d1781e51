"""Tiny random models and their tokenizer: the one place where tests make them."""

from __future__ import annotations

from typing import Any

import torch

from mendlm.runtime import RUNTIMES

CPU_RUNTIMES = [name for name in RUNTIMES if name != "semi-structured"]  # that one needs a CUDA device
BOS, EOS = 256, 257


def tiny_model(kind: str | type, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random causal language model in evaluation mode: two blocks, 64 wide, unless changed.

    `kind` is the name of a transformers class, such as "LlamaForCausalLM", or a class of one's own; `changes` are
    fields of its configuration.
    """
    import transformers

    shape = dict(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    make: Any = getattr(transformers, kind) if isinstance(kind, str) else kind
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(make.config_class(**(shape | changes))).to(dtype).eval()


def byte_letters() -> list[str]:
    """The letters that stand for the 256 bytes in a byte-level vocabulary, in the order of their ids."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer() -> Any:
    """One token a byte, then <s> and </s>; nothing merged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {letter: i for i, letter in enumerate(byte_letters())} | {"<s>": BOS, "</s>": EOS}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
