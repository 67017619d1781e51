"""Every family: compress, load in each runtime, and compare with the same compression done by plain torch."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mendlm
from mendlm import NM, TLR, Recipe, Unstructured, families, refine, select_mask
from mendlm.checkpoints.reader import open_checkpoint
from mendlm.errors import CheckpointError, UsageError
from mendlm.execution.tensor import tensor_generator
from mendlm.experts import SparseLowRankExperts, is_fused_experts, split_stacked, unfuse
from mendlm.families import EXPERT_LAYOUTS, STACKED_LAYOUT, block_of, module_name
from mendlm.pipeline import plan
from mendlm.planning import make_plan
from tiny import CPU_RUNTIMES

EPS32 = torch.finfo(torch.float32).eps
RECIPE = Recipe(pattern=NM(2, 4), refiner=TLR(rank=2, n_iter=3))
H, WIDTH, N_EXPERTS, VOCAB = 16, 12, 4, 40

LLAMA = {"num_key_value_heads": 2, "head_dim": 4}
MIXTURE = {"num_experts_per_tok": 2, **LLAMA}
QWEN_MOE = {"num_experts": N_EXPERTS, "moe_intermediate_size": WIDTH, "decoder_sparse_step": 1, **MIXTURE}


@dataclass(frozen=True)
class Kind:
    """A family, what its tiny model needs, and how many matrices a block of it has."""

    model_type: str
    n_matrices: int
    fields: dict[str, Any]
    stacked: bool = False

    def __str__(self) -> str:
        return self.model_type + "-stacked" * self.stacked


DENSE = (
    Kind("llama", 7, {"attention_bias": True, "mlp_bias": True, **LLAMA}),
    Kind("mistral", 7, LLAMA),
    Kind("qwen2", 7, LLAMA),  # biases of q, k and v
    Kind("qwen3", 7, LLAMA),
    Kind("gemma2", 7, LLAMA),
    Kind("gemma3_text", 7, LLAMA),
    Kind("phi3", 4, {"num_key_value_heads": 2}),
    Kind("gpt2", 4, {"n_inner": WIDTH}),
    Kind("opt", 6, {"ffn_dim": WIDTH, "word_embed_proj_dim": H}),
    Kind("gpt_neox", 4, {}),
    Kind("phi", 6, {}),
)
MIXTURES = (
    Kind("mixtral", 4 + 3 * N_EXPERTS, {"num_local_experts": N_EXPERTS, **MIXTURE}),
    Kind("qwen2_moe", 7 + 3 * N_EXPERTS, {"shared_expert_intermediate_size": WIDTH, **QWEN_MOE}),
    Kind("qwen3_moe", 4 + 3 * N_EXPERTS, QWEN_MOE),
    Kind("olmoe", 4 + 3 * N_EXPERTS, {"num_experts": N_EXPERTS, **MIXTURE}),
)
STACKED = tuple(Kind(kind.model_type, kind.n_matrices - N_EXPERTS, kind.fields, stacked=True) for kind in MIXTURES)
KINDS = (*DENSE, *MIXTURES, *STACKED)


def build_empty(kind: Kind) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind.model_type,
        hidden_size=H,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **kind.fields,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def build(kind: Kind) -> Any:
    """The model, with random weights (norms and biases too) large enough for the logits to depend on all of them."""
    model = build_empty(kind)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], tuple[Any, Path, Path]]:
    """Model, dense folder and compressed folder of a kind; made once. Read only."""
    made: dict[str, tuple[Any, Path, Path]] = {}

    def get(kind: Kind) -> tuple[Any, Path, Path]:
        if str(kind) not in made:
            folder = tmp_path_factory.mktemp(str(kind))
            model = build(kind)
            model.save_pretrained(folder / "dense", save_original_format=not kind.stacked)
            mendlm.compress(folder / "dense", folder / "packed", RECIPE)
            made[str(kind)] = (model, folder / "dense", folder / "packed")
        return made[str(kind)]

    return get


def replaced(tensors: dict[str, torch.Tensor], folder: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Dense tensors of a checkpoint with S + B A in place of what the plan lists, by plain torch."""
    out = {name: tensor.clone() for name, tensor in tensors.items()}
    for planned in plan(folder, recipe).compressed:
        place = out[planned.source] if planned.index is None else out[planned.source][planned.index]
        W = place.T if planned.transposed else place
        W = W.contiguous()
        generator = tensor_generator(recipe.seed, planned.name)
        refiner = recipe.refiner_for(*W.shape, name=planned.name)
        mask = select_mask(W, recipe.criterion, recipe.pattern, generator=generator)
        got = refine(W, mask, refiner, generator=generator)
        dense = got.S + got.B @ got.A
        place.copy_(dense.T if planned.transposed else dense)
    return out


def twin(folder: Path, into: Path, recipe: Recipe = RECIPE) -> Path:
    """A dense folder that holds the same compression."""
    into.mkdir()
    (into / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = replaced(load_file(folder / "model.safetensors"), folder, recipe)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 3 + 30).reshape(2, 15) * 7 % VOCAB
    return model(ids).logits.float()


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=256 * EPS32 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_are_those_of_the_same_compression_by_plain_torch(saved: Any, kind: Kind, tmp_path: Path) -> None:
    model, dense, packed = saved(kind)
    assert len(facts(packed)["modules"]) == 2 * kind.n_matrices
    other = twin(dense, tmp_path / "twin")
    expected = logits(mendlm.load(other))
    assert float((logits(model) - expected).abs().max()) > 0.01 * float(expected.abs().max())
    for runtime in CPU_RUNTIMES:
        loaded = mendlm.load(packed, runtime=runtime)
        assert_close(logits(loaded), expected)
        if runtime == "merged":
            assert_merged(loaded, model, other, tmp_path / "merged")
        else:
            assert_saved_packed(loaded, packed, tmp_path / runtime)
            assert_merged(loaded.dequantize(), model, other, tmp_path / "dequantized" / runtime)
            assert_close(logits(loaded), expected)


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def assert_merged(merged: Any, model: Any, other: Path, folder: Path) -> None:
    """Made of the modules it had before compression, and saved as an ordinary checkpoint."""
    before = {name: type(module) for name, module in model.named_modules()}
    after = {name: type(module) for name, module in merged.named_modules()}
    assert before == after
    merged.save_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    got, expected = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=64 * EPS32 * float(tensor.abs().max()), msg=name)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_zeros_are_where_numpy_puts_them(saved: Any, kind: Kind) -> None:
    _, dense, packed = saved(kind)
    weights = {name: tensor.numpy() for name, tensor in load_file(dense / "model.safetensors").items()}
    stored = {name: tensor.numpy() for name, tensor in load_file(packed / "model.safetensors").items()}
    masks = {name: bits for name, bits in stored.items() if name.endswith(".weight_bitmask")}
    assert len(masks) == 2 * kind.n_matrices
    for name, bits in masks.items():
        path = name.removesuffix(".weight_bitmask")
        if kind.stacked and ".experts." in path:
            experts, index, projection = path.rsplit(".", 2)
            W = weights[f"{experts}.{projection}"][int(index)]
        else:
            W = weights[f"{path}.weight"]
            W = W.T if kind.model_type == "gpt2" else W
        groups = np.abs(W).reshape(-1, 4)
        kept = np.zeros(groups.shape, dtype=bool)
        np.put_along_axis(kept, np.argsort(groups, axis=1)[:, 2:], True, axis=1)
        mask = np.unpackbits(bits, axis=1, bitorder="little")
        assert np.array_equal(mask[:, : W.shape[1]], kept.reshape(W.shape))
        assert stored[f"{path}.weight_values"].shape == (W.size // 2,)
        assert stored[f"{path}.lora_A"].shape == (2, W.shape[1])


def assert_saved_packed(model: Any, packed: Path, folder: Path) -> None:
    """Saved as the folder it was loaded from, so that it loads again as it did."""
    model.save_pretrained(folder)
    assert facts(folder) == facts(packed)
    got, expected = load_file(folder / "model.safetensors"), load_file(packed / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


GUARDED = [
    ("gpt2", {}),
    ("gpt2", {"include": ["*.c_proj.weight"]}),
    ("mixtral", {}),
    ("mixtral", {"include": ["*.experts.2.w2.weight"]}),  # the others could be stacked, but for one
    ("mixtral", {"include": ["*.experts.*.w2.weight"]}),
    ("qwen3_moe", {"include": ["*.experts.3.*"]}),
    ("mixtral-stacked", {"include": ["*.down_proj"]}),
    ("olmoe-stacked", {}),
]


@pytest.mark.parametrize(("name", "options"), GUARDED, ids=str)
def test_transformers_alone_refuses(
    saved: Any, name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import auto

    _, dense, _ = saved(next(kind for kind in KINDS if str(kind) == name))
    mendlm.compress(dense, tmp_path / "out", RECIPE.model_copy(update=options))
    assert_saved_packed(mendlm.load(tmp_path / "out", runtime="packed"), tmp_path / "out", tmp_path / "again")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "mendlm")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "mendlm")
    for folder in ("out", "again"):
        with pytest.raises(RuntimeError, match=r"ignore_mismatched_sizes|conversion"):
            AutoModelForCausalLM.from_pretrained(tmp_path / folder)


PARTS = [
    ("mixtral", {"include": ["*.experts.*.w2.weight", "*.experts.1.w1.weight"]}),
    ("mixtral", {"skip_layers": (0,)}),
    ("qwen2_moe", {"include": ["*.layers.1.mlp.experts.*.up_proj.weight"]}),
    ("qwen3_moe", {"exclude": ["*.experts.*"]}),
    ("mixtral-stacked", {"exclude": ["*.down_proj"]}),
    ("olmoe-stacked", {"include": ["*.layers.0.mlp.experts.down_proj"]}),
    ("qwen3_moe-stacked", {"skip_layers": (-1,)}),
    ("gpt2", {"exclude": ["*.attn.*"]}),
]


@pytest.mark.parametrize(("name", "options"), PARTS, ids=str)
def test_a_part_of_the_experts_or_blocks(saved: Any, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, dense, _ = saved(next(kind for kind in KINDS if str(kind) == name))
    recipe = RECIPE.model_copy(update=options)
    mendlm.compress(dense, tmp_path / "out", recipe)
    other = twin(dense, tmp_path / "twin", recipe)
    expected = logits(mendlm.load(other))
    for runtime in CPU_RUNTIMES:
        loaded = mendlm.load(tmp_path / "out", runtime=runtime)
        assert_close(logits(loaded), expected)
        if runtime == "merged":
            assert_merged(loaded, model, other, tmp_path / "merged")
        else:
            assert_saved_packed(loaded, tmp_path / "out", tmp_path / runtime)


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_a_model_without_head(saved: Any, name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    _, dense, packed = saved(next(kind for kind in KINDS if str(kind) == name))
    config = AutoConfig.from_pretrained(packed)
    config.quantization_config["runtime"] = "packed"
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        model = AutoModel.from_pretrained(packed, config=config)
        model.save_pretrained(tmp_path / "base")
        expected = AutoModel.from_pretrained(twin(dense, tmp_path / "twin"))(ids).last_hidden_state
        assert_close(model(ids).last_hidden_state, expected)
        assert_close(AutoModel.from_pretrained(tmp_path / "base")(ids).last_hidden_state, expected)


def test_gpt2_as_the_hub_has_it(saved: Any, tmp_path: Path) -> None:
    """Without a prefix, and with causal masks among the tensors."""
    _, dense, _ = saved(next(kind for kind in KINDS if kind.model_type == "gpt2"))
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(dense / "model.safetensors").items()
    }
    tensors |= {f"h.{block}.attn.bias": torch.ones(1, 1, 32, 32).tril() for block in (0, 1)}
    shutil.copytree(dense, tmp_path / "hub")
    save_file(tensors, tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})
    mendlm.compress(tmp_path / "hub", tmp_path / "out", RECIPE)
    assert facts(tmp_path / "out")["guard"] == "h.0.attn.c_attn.weight"
    expected = logits(mendlm.load(twin(tmp_path / "hub", tmp_path / "twin")))
    for runtime in CPU_RUNTIMES:
        model = mendlm.load(tmp_path / "out", runtime=runtime)
        assert_close(logits(model), expected)
        model.save_pretrained(tmp_path / runtime)
        assert_close(logits(mendlm.load(tmp_path / runtime)), expected)


def test_a_family_that_is_not_known_is_compressed_by_include(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    build(Kind("apertus", 6, {"num_key_value_heads": 2})).save_pretrained(dense)
    with pytest.raises(UsageError, match="unknown architecture: model_type 'apertus'"):
        plan(dense, RECIPE)
    recipe = RECIPE.model_copy(update={"include": ("*_proj.weight",), "skip_layers": (1,)})
    mendlm.compress(dense, tmp_path / "out", recipe)
    assert {name.split(".")[2] for name in facts(tmp_path / "out")["modules"]} == {"0"}
    expected = logits(mendlm.load(twin(dense, tmp_path / "twin", recipe)))
    for runtime in CPU_RUNTIMES:
        assert_close(logits(mendlm.load(tmp_path / "out", runtime=runtime)), expected)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_a_model_that_reads_the_weight_of_a_layer(tmp_path: Path, name: str) -> None:
    dense = tmp_path / "dense"
    build(Kind(name, 4, {"state_size": 4, "time_step_rank": 4})).save_pretrained(dense)
    recipe = RECIPE.model_copy(update={"include": ("*_proj.weight",)})
    mendlm.compress(dense, tmp_path / "out", recipe)
    expected = logits(mendlm.load(twin(dense, tmp_path / "twin", recipe)))
    for runtime in CPU_RUNTIMES:
        assert_close(logits(mendlm.load(tmp_path / "out", runtime=runtime)), expected)


def test_transposed_weights_of_a_family_that_is_not_known_are_refused(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their square matrices fit either way round."""
    _, dense, packed = saved(next(kind for kind in KINDS if kind.model_type == "gpt2"))
    monkeypatch.delitem(families.FAMILIES, "gpt2")
    mendlm.compress(dense, tmp_path / "out", RECIPE.model_copy(update={"include": ("*.attn.c_proj.weight",)}))
    for folder in (tmp_path / "out", packed):
        with pytest.raises(CheckpointError, match=r"but GPT2LMHeadModel has a Conv1D there.*how this family keeps"):
            mendlm.load(folder)


def test_linear_layers_that_compute_something_else_are_refused(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the block-diagonal ones of DeepSeek-V4, and routers that are linear layers."""
    from transformers.models.llama import modeling_llama

    from mendlm.hf import module_places

    class TwiceLinear(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Mlp(modeling_llama.LlamaMLP):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.up_proj = TwiceLinear(H, WIDTH)

    _, dense, packed = saved(DENSE[0])
    paths = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    assert module_places(dense, paths) == dict(zip(paths, paths, strict=True))
    monkeypatch.setattr(modeling_llama, "LlamaMLP", Mlp)
    assert module_places(dense, paths) == dict(zip(paths, (paths[0], None), strict=True))
    with pytest.raises(
        CheckpointError, match=r"layer 'model\.layers\.\d\.mlp\.up_proj' but .* has a TwiceLinear there"
    ):
        mendlm.load(packed)


def test_falcon_whose_linear_layers_are_a_class_of_its_own(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    build(Kind("falcon", 4, {"num_kv_heads": 4, "new_decoder_architecture": False})).save_pretrained(dense)
    recipe = RECIPE.model_copy(update={"include": ("*.dense*.weight", "*.query_key_value.weight")})
    mendlm.compress(dense, tmp_path / "out", recipe)
    expected = logits(mendlm.load(twin(dense, tmp_path / "twin", recipe)))
    for runtime in CPU_RUNTIMES:
        assert_close(logits(mendlm.load(tmp_path / "out", runtime=runtime)), expected)


def test_a_linear_layer_in_place_of_a_transposed_one_is_refused(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, packed = saved(DENSE[0])
    monkeypatch.setitem(families.FAMILIES, "llama", dataclasses.replace(families.FAMILIES["llama"], transposed=True))
    with pytest.raises(CheckpointError, match=r"_proj', turned from .* but LlamaForCausalLM has a Linear there"):
        mendlm.load(packed)


def test_experts_of_another_make_are_refused(tmp_path: Path) -> None:
    model = build(Kind("gpt_oss", 0, {"num_local_experts": 2, **MIXTURE}))
    experts = model.model.layers[0].mlp.experts
    assert not is_fused_experts(experts)
    assert not is_fused_experts(None)
    with pytest.raises(UsageError, match="GptOssExperts does not keep its experts as"):
        unfuse(model, [f"model.layers.0.mlp.experts.{name}" for name, _ in experts.named_parameters()])
    model.save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match=r"matches 'model\.layers\.0\.mlp\.experts\.down_proj' but no tensor that can be"
    ):
        plan(tmp_path, RECIPE.model_copy(update={"include": ("*.down_proj",)}))


def test_experts_that_are_listed_in_part_are_refused(saved: Any, tmp_path: Path) -> None:
    _, _, packed = saved(STACKED[0])
    shutil.copytree(packed, tmp_path / "copy")
    config = json.loads((packed / "config.json").read_text())
    gone = "model.layers.1.mlp.experts.2.gate_up_proj"
    del config["quantization_config"]["modules"][gone]
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    tensors = load_file(packed / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{gone}.")}
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.\*\.gate_up_proj for some experts only"):
        mendlm.load(tmp_path / "copy")


def test_experts_with_names_of_two_layouts_are_refused(saved: Any, tmp_path: Path) -> None:
    _, _, packed = saved(MIXTURES[0])
    config = json.loads((packed / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules["model.layers.0.block_sparse_moe.experts.0.up_proj"] = {"n_kept": 1, "rank": 1}
    shutil.copytree(packed, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"projections up_proj, w1, w2, w3 are not known.*\[model\.layers\.0\.mlp"):
        mendlm.load(tmp_path / "copy")


@pytest.mark.parametrize("kind", [*MIXTURES, *STACKED], ids=str)
def test_experts_apart_compute_what_they_did_together(saved: Any, kind: Kind) -> None:
    model, dense, _ = saved(kind)
    tensors = load_file(dense / "model.safetensors")
    expected, model = logits(model), copy.deepcopy(model)
    names = [module_name(kind.model_type, name) for name in tensors]
    paths = [f"model.layers.{block}.mlp.experts" for block in (0, 1)]
    assert sorted(unfuse(model, names)) == paths
    assert unfuse(model, names) == ()
    calls: dict[str, int] = {}
    for path in paths:
        experts = model.get_submodule(path)
        assert isinstance(experts, SparseLowRankExperts)
        for name, module in experts.named_modules():
            if isinstance(module, torch.nn.Linear):
                full = f"{path}.{name}"
                calls[full] = 0
                module.register_forward_hook(lambda _, x, __, full=full: calls.update({full: calls[full] + len(x[0])}))
    assert_close(logits(model), expected)
    projections = kind.n_matrices - (7 if kind.model_type == "qwen2_moe" else 4)
    assert len(calls) == 2 * projections
    last = {name: n for name, n in calls.items() if re.search(r"\.(?:down_proj|w2)$", name)}
    assert sum(last.values()) == 2 * 2 * 30  # blocks, experts of a token, tokens
    known = {f"{name}.weight": model.get_submodule(name).weight for name in calls}
    split: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        full = module_name(kind.model_type, name)
        split.update(split_stacked(full, tensor) if tensor.ndim == 3 else {full: tensor})
    assert known.keys() == {name for name in split if ".experts." in name}
    assert all(torch.equal(weight, split[name]) for name, weight in known.items())


def test_experts_apart_on_no_device_and_back(saved: Any) -> None:
    model, _, _ = saved(MIXTURES[1])
    with torch.device("meta"):
        other = build_empty(MIXTURES[1])
    path = "model.layers.1.mlp.experts"
    assert unfuse(other, [f"{path}.0.up_proj.weight"]) == (path,)
    apart = other.get_submodule(path)
    shapes = {name: tuple(weight.shape) for name, weight in apart.named_parameters()}
    assert shapes["3.gate_proj.weight"] == (WIDTH, H)
    assert shapes["0.down_proj.weight"] == (H, WIDTH)
    assert all(weight.is_meta for weight in apart.parameters())
    mixed = SparseLowRankExperts(copy.deepcopy(model).get_submodule(path), STACKED_LAYOUT, ["down_proj"])
    assert {name for name, _ in mixed.named_parameters()} == {
        "down_proj",
        *(f"{index}.gate_up_proj.weight" for index in range(N_EXPERTS)),
    }
    assert not mixed.training
    fused, original = mixed.train().fuse(), model.get_submodule(path)
    assert fused.training
    assert fused.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(fused.state_dict()[name], original.state_dict()[name]) for name in fused.state_dict())


def test_a_token_without_an_expert_adds_nothing(saved: Any) -> None:
    experts = copy.deepcopy(saved(MIXTURES[0])[0]).get_submodule("model.layers.0.mlp.experts")
    x = torch.randn(3, H, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[0, N_EXPERTS], [N_EXPERTS, N_EXPERTS], [3, 0]])  # as in expert parallelism
    weight = torch.tensor([[0.5, 9.0], [9.0, 9.0], [0.25, 0.75]])
    with torch.inference_mode():
        each = [experts.act_fn(x @ W[:WIDTH].T) * (x @ W[WIDTH:].T) for W in experts.gate_up_proj]
        y = [h @ W.T for h, W in zip(each, experts.down_proj, strict=True)]
        expected = torch.stack([0.5 * y[0][0], torch.zeros(H), 0.25 * y[3][2] + 0.75 * y[0][2]])
        apart = SparseLowRankExperts(experts, EXPERT_LAYOUTS[1])
        assert_close(apart(x, index, weight), expected)


SKIPPED = [
    ((0,), {1}),
    ((-1,), {0}),
    ((), {0, 1}),
]


@pytest.mark.parametrize(("layers", "left"), SKIPPED, ids=str)
@pytest.mark.parametrize("kind", [DENSE[0], DENSE[7], DENSE[8], MIXTURES[0], STACKED[0]], ids=str)
def test_skip_layers(saved: Any, kind: Kind, layers: tuple[int, ...], left: set[int]) -> None:
    _, dense, _ = saved(kind)
    planned = plan(dense, RECIPE.model_copy(update={"skip_layers": layers}))
    assert {block_of(tensor.name, kind.model_type) for tensor in planned.compressed} == left
    assert len(planned.compressed) == len(left) * kind.n_matrices


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((2,), r"skip_layers 2: the model has 2 layers, 0 to 1, or -2 to -1"),
        ((0, -3), r"skip_layers -3: the model has 2 layers"),
        ((0, -1), r"skip_layers \[0, -1\] leaves no tensor to compress"),
    ],
)
def test_bad_skip_layers(saved: Any, layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(saved(DENSE[0])[1], RECIPE.model_copy(update={"skip_layers": layers}))


def test_skip_layers_without_layers(tmp_path: Path) -> None:
    save_file({"encoder.stage.0.weight": torch.ones(8, 8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    recipe = RECIPE.model_copy(update={"include": ("*",), "skip_layers": (0,)})
    with pytest.raises(UsageError, match=r"skip_layers \[0\]: no tensor's name says in which layer it is"):
        plan(tmp_path, recipe)


def test_sparsities_by_tensor(saved: Any) -> None:
    checkpoint = open_checkpoint(saved(STACKED[1])[1])
    one = "model.layers.1.mlp.experts.2.gate_up_proj.weight"
    planned = make_plan(checkpoint, Recipe(pattern=Unstructured(0.5), rank=2), {one: 0.25})
    kept = {tensor.name: tensor.n_kept / (tensor.shape[0] * tensor.shape[1]) for tensor in planned.compressed}
    assert kept.pop(one) == 0.75
    assert set(kept.values()) == {0.5}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dense_export_has_the_tensors_of_the_original(saved: Any, kind: Kind, tmp_path: Path) -> None:
    """Conv1D is turned back, experts are stacked again where they were."""
    _, dense, packed = saved(kind)
    mendlm.export(packed, tmp_path / "out", "dense")
    got, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(dense / "model.safetensors")
    expected = replaced(original, dense, RECIPE)
    assert got.keys() == original.keys()
    for name, W in expected.items():
        torch.testing.assert_close(got[name], W, rtol=0, atol=4 * torch.finfo(W.dtype).eps * float(W.abs().max()))
