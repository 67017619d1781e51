"""A random checkpoint in the shape of LLaMA-7B, with a chosen number of blocks.

    python benchmarks/llama_shape.py FOLDER [--blocks 4] [--vocab 32000] [--seed 0]

Weights look like those of a real model to a compressor: Gaussian noise, a decaying spectrum, a few outlier columns.
Written in bfloat16, one shard for each block and one for each of the embedding tables; one matrix is in memory at a
time, and one shard. Same arguments, same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, HEADS, VOCAB, BLOCKS = 4096, 11008, 32, 32000, 32
ATTENTION = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
MLP = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}
PROJECTIONS = {**ATTENTION, **{f"mlp.{name}": shape for name, shape in MLP.items()}}
SPECTRUM = 128  # directions that stand out of the noise


def matrix(d_out: int, d_in: int, generator: torch.Generator) -> torch.Tensor:
    """(d_out, d_in) float32: noise, a spectrum that decays as 1 / i^0.8, one column in 200 twenty times as large."""
    rank = min(SPECTRUM, d_out, d_in)
    decay = torch.arange(1, rank + 1) ** -0.8
    left = 3 * torch.randn(d_out, rank, generator=generator) * decay
    W = torch.randn(d_out, d_in, generator=generator).addmm_(left, torch.randn(rank, d_in, generator=generator))
    W[:, torch.randperm(d_in, generator=generator)[: d_in // 200]] *= 20
    return W.mul_(0.02)


def shards(n_blocks: int, vocab: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of one file after the other."""
    g = torch.Generator().manual_seed(seed)
    yield {"model.embed_tokens.weight": (0.02 * torch.randn(vocab, HIDDEN, generator=g)).bfloat16()}
    for block in range(n_blocks):
        tensors = {f"{name}.weight": matrix(*shape, g).bfloat16() for name, shape in PROJECTIONS.items()}
        norms = {f"{name}_layernorm.weight": torch.ones(HIDDEN).bfloat16() for name in ("input", "post_attention")}
        yield {f"model.layers.{block}.{name}": tensor for name, tensor in (tensors | norms).items()}
    yield {
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
        "lm_head.weight": (0.02 * torch.randn(vocab, HIDDEN, generator=g)).bfloat16(),
    }


def write(folder: Path, n_blocks: int, vocab: int = VOCAB, seed: int = 0) -> None:
    """The checkpoint; `folder` must be new or empty."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"{str(folder)!r} is not empty. Name a new folder.")
    n_files, weight_map, total = n_blocks + 2, {}, 0
    for index, tensors in enumerate(shards(n_blocks, vocab, seed), 1):
        file = f"model-{index:05d}-of-{n_files:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1) + "\n")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": n_blocks,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=4, help="of 32; 0.4 GB each")
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, options.blocks, options.vocab, options.seed)


if __name__ == "__main__":
    main()
