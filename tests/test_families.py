"""The table of families, held against the modules that transformers builds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mendlm.errors import UsageError
from mendlm.families import FAMILIES, choose_tensors

MIXTURES = {
    "mixtral": {"num_local_experts": 2},
    "olmoe": {"num_experts": 2},
    "qwen2_moe": {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 2, "moe_intermediate_size": 8},
}
DENSE = sorted(FAMILIES.keys() - MIXTURES)


def build(model_type: str, **fields: Any) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **fields)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", DENSE)
def test_chosen_are_exactly_the_linear_layers_of_the_blocks(model_type: str) -> None:
    with torch.device("meta"):
        model = build(model_type, num_hidden_layers=2)
    names = [name for name, value in model.named_parameters() if value.ndim == 2]
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {f"{name}.weight" for name in linear if re.search(r"\blayers\.\d+\.", name)}
    assert set(choose_tensors(model_type, names, names)) == blocks
    assert blocks


@pytest.mark.parametrize("model_type", sorted(MIXTURES))
def test_experts_but_not_routers_of_mixtures(model_type: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "vocab_size": 32, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
    build(model_type, **sizes, **heads, **MIXTURES[model_type]).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2]
    left = set(names) - set(choose_tensors(model_type, names, names))
    routers = {
        name for name in names if re.search(r"(?:mlp|block_sparse_moe)\.(?:gate|shared_expert_gate)\.weight$", name)
    }
    assert left == {"model.embed_tokens.weight", "lm_head.weight"} | routers
    assert routers
    assert sum("experts" in name for name in names) == 6


NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "lm_head.weight",
)


def test_include_replaces_and_exclude_takes_away() -> None:
    choose = choose_tensors
    assert choose("llama", NAMES, NAMES) == NAMES[1:4]
    assert choose("llama", NAMES, NAMES, include=("*.up_proj.weight", "lm_head*")) == NAMES[2:]
    assert choose("llama", NAMES, NAMES, exclude=("*.layers.0.*",)) == (NAMES[3],)
    assert choose("unheard-of", NAMES, NAMES, include=("*.q_proj.weight",)) == (NAMES[1],)
    assert choose(None, NAMES, NAMES, include=("*",), exclude=("*embed*",)) == NAMES[1:]


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("lama", {}, r"unknown architecture: model_type 'lama'.*Did you mean 'llama'\? Known: .*mistral.*--include"),
        (None, {}, r"unknown architecture: model_type None"),
        ("gpt_neox", {}, r"no tensor looks like a block projection of model_type 'gpt_neox'"),
        ("llama", {"include": ["*.q_prj.*"]}, r"--include '\*\.q_prj\.\*' matches no tensor of this checkpoint"),
        ("llama", {"include": ["*norm*"]}, r"'\*norm\*' matches 'model\.norm\.weight' but no tensor that can be"),
        ("llama", {"exclude": ["*.LAYERS.*"]}, r"--exclude '\*\.LAYERS\.\*' matches no tensor"),
        ("llama", {"exclude": ["*"]}, r"--exclude leaves no tensor to compress"),
        ("llama", {"include": ["*"]}, r"'model\.embed_tokens\.weight' is an embedding"),
    ],
)
def test_bad_choice(model_type: str | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_tensors(model_type, NAMES, (*NAMES, "model.norm.weight"), **options)
