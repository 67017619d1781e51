"""A random checkpoint in the shape of LLaMA-7B, with a chosen number of blocks.

    python benchmarks/llama_shape.py FOLDER [--blocks 4] [--vocab 32000] [--seed 0] [--device cuda]

Weights look like those of a real model to a compressor: Gaussian noise, a decaying spectrum, a few outlier columns.
Written in bfloat16, one shard for each block and one for each of the embedding tables; one tensor is in memory at a
time. Same arguments, same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mendlm.checkpoints.reader import as_bytes
from mendlm.checkpoints.writer import ShardLayout, ShardWriter

SPECTRUM = 128  # directions that stand out of the noise

Tensors = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Llama:
    """Sizes of a model of the LLaMA family; `kv` is the width of keys and values, all heads together."""

    hidden: int
    intermediate: int
    heads: int
    kv: int
    blocks: int
    vocab: int = 32000

    def projections(self) -> dict[str, tuple[int, int]]:
        """Name in a block -> (d_out, d_in) of what is compressed."""
        h, i = self.hidden, self.intermediate
        attention = {"q": (h, h), "k": (self.kv, h), "v": (self.kv, h), "o": (h, h)}
        mlp = {"gate": (i, h), "up": (i, h), "down": (h, i)}
        return {
            **{f"self_attn.{name}_proj": shape for name, shape in attention.items()},
            **{f"mlp.{name}_proj": shape for name, shape in mlp.items()},
        }


LLAMA_7B = Llama(hidden=4096, intermediate=11008, heads=32, kv=4096, blocks=32)
LLAMA_70B = Llama(hidden=8192, intermediate=28672, heads=64, kv=1024, blocks=80)


def matrix(d_out: int, d_in: int, generator: torch.Generator) -> torch.Tensor:
    """(d_out, d_in) float32: noise, a spectrum that decays as 1 / i^0.8, one column in 200 twenty times as large.

    On the device of `generator`.
    """
    rank, on = min(SPECTRUM, d_out, d_in), generator.device
    decay = torch.arange(1, rank + 1, device=on) ** -0.8
    left = 3 * torch.randn(d_out, rank, generator=generator, device=on) * decay
    right = torch.randn(rank, d_in, generator=generator, device=on)
    W = torch.randn(d_out, d_in, generator=generator, device=on).addmm_(left, right)
    W[:, torch.randperm(d_in, generator=generator, device=on)[: d_in // 200]] *= 20
    return W.mul_(0.02)


def shards(model: Llama) -> Iterator[Tensors]:
    """Names and shapes of one file after the other."""
    yield {"model.embed_tokens.weight": (model.vocab, model.hidden)}
    for block in range(model.blocks):
        tensors: Tensors = {f"{name}.weight": shape for name, shape in model.projections().items()}
        norms: Tensors = {f"{name}_layernorm.weight": (model.hidden,) for name in ("input", "post_attention")}
        yield {f"model.layers.{block}.{name}": shape for name, shape in (tensors | norms).items()}
    yield {"model.norm.weight": (model.hidden,), "lm_head.weight": (model.vocab, model.hidden)}


def values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """The tensor `name`, bfloat16, on the CPU."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith("_proj.weight"):
        return matrix(shape[0], shape[1], generator).bfloat16().cpu()
    return torch.randn(shape, generator=generator, device=generator.device).mul_(0.02).bfloat16().cpu()


def write(folder: Path, model: Llama, seed: int = 0, device: str = "cpu") -> None:
    """The checkpoint; `folder` must be new or empty. Numbers are drawn on `device`, and are others on each kind."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"{str(folder)!r} is not empty. Name a new folder.")
    generator = torch.Generator(device=device).manual_seed(seed)
    n_files, weight_map, total = model.blocks + 2, {}, 0
    for index, tensors in enumerate(shards(model), 1):
        file = f"model-{index:05d}-of-{n_files:05d}.safetensors"
        layout = ShardLayout(file, ((name, "BF16", shape) for name, shape in tensors.items()), {"format": "pt"})
        with ShardWriter(folder, layout) as writer:
            writer.allocate()
            for name, shape in tensors.items():
                writer.write(name, [as_bytes(values(name, shape, generator))])
        weight_map.update(dict.fromkeys(tensors, file))
        total += layout.data_bytes
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1) + "\n")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads * model.kv // model.hidden,
        "num_hidden_layers": model.blocks,
        "vocab_size": model.vocab,
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
    parser.add_argument("--vocab", type=int, default=LLAMA_7B.vocab)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where to draw the numbers: cuda takes seconds a block less")
    options = parser.parse_args()
    model = dataclasses.replace(LLAMA_7B, blocks=options.blocks, vocab=options.vocab)
    write(options.folder, model, options.seed, options.device)


if __name__ == "__main__":
    main()
