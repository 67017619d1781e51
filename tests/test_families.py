"""The table of families, held against the modules that transformers builds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mendlm.errors import UsageError
from mendlm.families import (
    FAMILIES,
    block_of,
    can_be_compressed,
    choose_tensors,
    expert_name,
    is_transposed,
    module_name,
    split_block,
    split_expert,
)

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
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = build(model_type, num_hidden_layers=2)
    names = [name for name, value in model.named_parameters() if can_be_compressed(model_type, name, value.ndim)]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    blocks = {f"{name}.weight": module for name, module in layers.items() if re.search(r"\b(?:layers|h)\.\d+\.", name)}
    assert set(choose_tensors(model_type, names, names)) == set(blocks)
    assert blocks
    for name, module in blocks.items():
        assert is_transposed(model_type, name) == isinstance(module, Conv1D)
    assert not is_transposed(model_type, "lm_head.weight")
    assert {block_of(name, model_type) for name in blocks} == {0, 1}
    outside = {name for name, _ in model.named_parameters() if block_of(name, model_type) is None}
    assert not any(re.search(r"\.\d+\.", name) for name in outside)
    assert outside


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("model_type", sorted(MIXTURES))
def test_experts_but_not_routers_of_mixtures(model_type: str, stacked: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "vocab_size": 32, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
    model = build(model_type, **sizes, **heads, **MIXTURES[model_type])
    model.save_pretrained(tmp_path, save_original_format=not stacked)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    names = [name for name, shape in shapes.items() if can_be_compressed(model_type, name, len(shape))]
    left = set(names) - set(choose_tensors(model_type, names, names))
    routers = {
        name for name in names if re.search(r"(?:mlp|block_sparse_moe)\.(?:gate|shared_expert_gate)\.weight$", name)
    }
    assert left == {"model.embed_tokens.weight", "lm_head.weight"} | routers
    assert routers
    assert sum("experts" in name for name in names) == (2 if stacked else 6)
    in_model = {name for name, _ in model.named_parameters()}
    assert {module_name(model_type, name) for name in shapes if "experts." not in name} <= in_model
    for name in names:
        path = module_name(model_type, expert_name(name, 1) if len(shapes[name]) == 3 else name).removesuffix(".weight")
        if "experts." in name:
            assert split_expert(path) in {
                ("model.layers.0.mlp.experts", index, path.rpartition(".")[2]) for index in (0, 1)
            }
        else:
            assert split_expert(path) is None


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.12.input_layernorm.weight", ("model.layers", 12, "input_layernorm.weight")),
        ("layers.0.mlp.experts.3.w1.weight", ("layers", 0, "mlp.experts.3.w1.weight")),
        ("h.1.attn.bias", ("h", 1, "attn.bias")),
        ("model.decoder.layers.0.fc1.bias", ("model.decoder.layers", 0, "fc1.bias")),
        ("a.layers.1.b.layers.2.c", ("a.layers", 1, "b.layers.2.c")),
        ("model.norm.weight", None),
        ("model.layers.x.weight", None),
        ("model.mylayers.0.weight", None),
        ("model.layers.0", None),
    ],
)
def test_split_block(name: str, parts: tuple[str, int, str] | None) -> None:
    assert split_block(name) == parts
    assert block_of(name, "unheard-of") == (None if parts is None else parts[1])


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("model.layers.0.mlp.experts.3.up_proj", ("model.layers.0.mlp.experts", 3, "up_proj")),
        ("layers.0.block_sparse_moe.experts.11.w2", ("layers.0.block_sparse_moe.experts", 11, "w2")),
        ("experts.0.gate_up_proj", ("experts", 0, "gate_up_proj")),
        ("model.layers.0.mlps.1.down_proj", None),  # LongCat-Flash: two dense MLPs in a block
        ("model.layers.0.mlp.shared_experts.0.down_proj", None),
        ("model.layers.0.mlp.shared_experts.down_proj", None),
        ("model.layers.0.down_proj", None),
        ("model.layers.0.mlp.experts.3.fc1", None),
    ],
)
def test_split_expert(path: str, parts: tuple[str, int, str] | None) -> None:
    assert split_expert(path) == parts


def test_names_of_other_lists_are_in_no_block_of_a_known_family() -> None:
    assert block_of("transformer.h.3.ln_1.weight", "gpt2") == 3
    assert block_of("transformer.h.3.ln_1.weight", "llama") is None
    assert block_of("model.layers.3.mlp.up_proj.weight", "gpt2") is None


def test_stacked_experts_are_known_by_family_only() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert can_be_compressed("mixtral", name, 3)
    assert not can_be_compressed("mixtral", name, 2)
    assert not can_be_compressed("mixtral", f"{name}_bias", 3)
    assert not can_be_compressed("gpt_oss", name, 3)
    assert not can_be_compressed("llama", name, 3)
    assert can_be_compressed(None, "x.weight", 2)


def test_the_page_lists_every_family() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "families.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(FAMILIES)


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
    assert choose("llama", NAMES, NAMES, tied=True) == NAMES[1:4]


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
        ("llama", {"include": ["lm_*"], "tied": True}, r"'lm_head\.weight' is tied .* Add --exclude 'lm_head\.weight'"),
    ],
)
def test_bad_choice(model_type: str | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_tensors(model_type, NAMES, (*NAMES, "model.norm.weight"), **options)
