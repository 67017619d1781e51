"""`export`: every layout against its definition, PEFT and transformers as the judges; refusals leave nothing behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mendlm
from mendlm import NM, TLR, Recipe, Unstructured
from mendlm.checkpoints.folder import open_folder
from mendlm.checkpoints.plan import EXPORTED
from mendlm.cli import main
from mendlm.errors import CheckpointError, MendError, UsageError
from mendlm.exporting import LAYOUTS, Layer
from mendlm.exporting.peft import VLLM_RANKS
from mendlm.inspection import inspect
from tiny import byte_tokenizer, tiny_model

EPS32 = torch.finfo(torch.float32).eps
IDS = torch.arange(60)[None] * 4 % 256
# Ranks 0, 2 and 5, so that patterns and absent factors count.
RECIPE = Recipe(
    pattern=NM(2, 4),
    refiner=TLR(rank=2, n_iter=4),
    overrides=[{"match": "*.up_proj.weight", "rank": 5}, {"match": "*.layers.0.mlp.down_proj.weight", "rank": 0}],
)


@pytest.fixture(scope="module")
def packed(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compressed in shards, with different ranks, and with a card of its own."""
    model = make_tiny_llama(max_shard_size="100KB", tied=False)
    card = "---\nlicense: apache-2.0\ntags:\n- tiny\n---\n# Tiny\n"
    (model / "README.md").write_text(card, encoding="utf-8")
    out = tmp_path_factory.mktemp("exporting") / "packed"
    mendlm.compress(model, out, RECIPE)
    assert (out / "model.safetensors.index.json").exists()
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def layers(folder: Path) -> dict[str, Any]:
    found = [Layer.of(name, parts, "llama") for name, parts in open_folder(folder).packed.items()]
    return {layer.path: layer.read() for layer in found}


def assert_close(got: torch.Tensor, expected: torch.Tensor, ulps: int = 256) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=ulps * EPS32 * float(expected.abs().max()))


def test_dense_opens_in_transformers_and_is_s_plus_ba(packed: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = mendlm.export(packed, tmp_path / "dense", "dense")
    stored = tensors(tmp_path / "dense")
    for path, layer in layers(packed).items():
        expected = (layer.S.double() + layer.B.double() @ layer.A.double()).float()
        assert_close(stored[f"{path}.weight"], expected, ulps=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert getattr(model.config, "quantization_config", None) is None
    assert torch.equal(logits(model), logits(mendlm.load(packed)))
    assert result.output_bytes == result.dense_bytes == sum(t.nbytes for t in stored.values())
    assert result.packed_bytes == sum(t.nbytes for t in tensors(packed).values())


def test_factored_holds_s_and_the_factors_bit_for_bit(packed: Path, tmp_path: Path) -> None:
    mendlm.export(packed, tmp_path / "out", "safetensors-factored")
    stored = tensors(tmp_path / "out")
    for path, layer in layers(packed).items():
        assert torch.equal(stored[f"{path}.S"], layer.S)
        assert torch.equal(stored[f"{path}.lora_A"], layer.A)
        assert torch.equal(stored[f"{path}.lora_B"], layer.B)
        assert f"{path}.weight" not in stored
    with pytest.raises(MendError):
        mendlm.load(tmp_path / "out")


def load_with_peft(folder: Path, **options: Any) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT still uses names that transformers deprecated
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder, **options)


@pytest.mark.parametrize("uniform_rank", [None, "auto", 7])
def test_peft_gives_the_logits_of_mendlm(packed: Path, tmp_path: Path, uniform_rank: Any) -> None:
    from transformers import AutoModelForCausalLM

    mendlm.export(packed, tmp_path / "peft", "peft", uniform_rank=uniform_rank)
    expected = logits(mendlm.load(packed, runtime="factored"))
    assert_close(logits(load_with_peft(tmp_path / "peft")), expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "peft" / "base")
    assert float((logits(base) - expected).abs().max()) > 1e-3 * float(expected.abs().max())  # S alone is not enough
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.load_adapter(str(tmp_path / "peft"))
    assert_close(logits(base), expected)


def test_peft_adapter_config(packed: Path, tmp_path: Path) -> None:
    mendlm.export(packed, tmp_path / "peft", "peft", base_name="me/base")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) == {2}
    assert config["base_model_name_or_path"] == "me/base"
    assert "model.layers.0.mlp.down_proj" not in config["target_modules"]  # rank 0
    adapter = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    ranks = {layer.A.shape[0] for layer in layers(packed).values()}
    assert {t.shape[0] for name, t in adapter.items() if "lora_A" in name} == ranks - {0}


def test_uniform_rank_is_one_that_vllm_serves(packed: Path, tmp_path: Path) -> None:
    mendlm.export(packed, tmp_path / "peft", "peft", uniform_rank="auto")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert 8 in VLLM_RANKS
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    adapter = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in adapter.items() if "lora_A" in name} == {8}
    with pytest.raises(UsageError, match="from the largest rank, 5, on"):
        mendlm.export(packed, tmp_path / "other", "peft", uniform_rank=4)


def test_training_the_adapter_keeps_the_zeros(packed: Path, tmp_path: Path) -> None:
    mendlm.export(packed, tmp_path / "peft", "peft")
    model = load_with_peft(tmp_path / "peft", is_trainable=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_gpt2_goes_through_peft(tmp_path: Path) -> None:
    model = tiny_model("GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=4, n_positions=128)
    model.save_pretrained(tmp_path / "model")
    mendlm.compress(tmp_path / "model", tmp_path / "packed", Recipe(pattern=NM(2, 4), refiner=TLR(rank=3, n_iter=4)))
    mendlm.export(tmp_path / "packed", tmp_path / "peft", "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["fan_in_fan_out"]
    assert_close(logits(load_with_peft(tmp_path / "peft")), logits(mendlm.load(tmp_path / "packed")))


def test_semi_structured_is_what_torch_converts_back(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    model = tiny_model("LlamaForCausalLM", dtype=torch.bfloat16, intermediate_size=128, num_key_value_heads=4)
    model.save_pretrained(tmp_path / "model")
    mendlm.compress(tmp_path / "model", tmp_path / "packed", Recipe(pattern=NM(2, 4), refiner=TLR(rank=2, n_iter=4)))
    mendlm.export(tmp_path / "packed", tmp_path / "semi", "semi-structured")
    stored = tensors(tmp_path / "semi")
    for path, layer in layers(tmp_path / "packed").items():
        packed, meta = stored[f"{path}.weight_packed"], stored[f"{path}.weight_meta"]
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed, meta), layer.S)
        assert torch.equal(stored[f"{path}.lora_B"], layer.B)


def test_the_card_says_what_it_is(packed: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "ppl.json"
    protocol = {"model": "/somewhere/packed", "text": "wiki.parquet", "dtype": "float32"}
    row = {"ppl": 12.3456, "n_windows": 8, "seqlen": 2048, "protocol": protocol}
    broken = row | {"ppl": None, "protocol": protocol | {"model": "broken"}}  # JSON has no infinity
    evaluation.write_text(json.dumps([row, broken]))
    mendlm.export(packed, tmp_path / "out", "peft", evaluations=[evaluation])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\ntags:\n- tiny\n- mendlm\n")
    assert "| packed | wiki.parquet | 8 × 2048 tokens, float32 | 12.346 |" in card
    assert "| broken | wiki.parquet | 8 × 2048 tokens, float32 | infinite |" in card
    assert "PeftModel.from_pretrained" in card
    assert "criterion: magnitude" in card
    assert str(tmp_path) not in card
    assert (tmp_path / "out" / "README.original.md").read_text().startswith("---\nlicense")


def test_an_export_is_reproducible_and_does_not_replace_in_silence(packed: Path, tmp_path: Path) -> None:
    mendlm.export(packed, tmp_path / "out", "dense")
    first = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(UsageError, match="not empty"):
        mendlm.export(packed, tmp_path / "out", "dense")
    mendlm.export(packed, tmp_path / "out", "dense", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == first


@pytest.mark.parametrize("layout", ["dense", "peft", "safetensors-factored"])
def test_overwrite_replaces_an_export(packed: Path, tmp_path: Path, layout: str) -> None:
    mendlm.export(packed, tmp_path / "out", layout)
    mendlm.export(packed, tmp_path / "out", "dense", overwrite=True)
    assert json.loads((tmp_path / "out" / "mendlm.export.json").read_text())["layout"] == "dense"


def test_the_original_is_not_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    model, packed = tmp_path / "model", tmp_path / "packed"
    shutil.copytree(tiny_llama, model)
    mendlm.compress(model, packed, Recipe(rank=2, n_iter=2))
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    with pytest.raises(UsageError, match=r"DEST .*model' is the model that was compressed"):
        mendlm.export(packed, model, "dense", overwrite=True)
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before
    with (model / "model.safetensors").open("r+b") as file:  # another model of the same sizes
        file.seek(-1, 2)
        file.write(b"\x7f")
    mendlm.export(packed, model, "dense", overwrite=True)
    assert (model / "mendlm.export.json").exists()


def test_a_dest_that_overlaps_is_called_dest(copy: Path, tmp_path: Path) -> None:
    """Here OUT is the folder to read."""
    for dest, message in (
        (copy, "DEST .*copy' is OUT or lies inside it"),
        (copy / "dense", "DEST .*dense' is OUT or lies inside it"),
        (tmp_path, "DEST .* holds OUT"),
        (copy / "config.json" / "x", "DEST"),
    ):
        with pytest.raises(UsageError, match=message):
            mendlm.export(copy, dest, "dense", overwrite=True)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def first_shard(folder: Path, part: str) -> tuple[Path, str]:
    for file in sorted(folder.glob("model*.safetensors")):
        for name in load_file(file):
            if name.endswith(part) and load_file(file)[name].numel():
                return file, name
    raise AssertionError(part)


def newer(folder: Path) -> None:
    edit_config(folder, version=2)


def more_bits(folder: Path) -> None:
    file, name = first_shard(folder, "weight_bitmask")
    data = load_file(file)
    data[name][0, 0] = 255
    save_file(data, file)


def shorter_file(folder: Path) -> None:
    file, _ = first_shard(folder, "lora_B")
    file.write_bytes(file.read_bytes()[:-16])


def smaller_factor(folder: Path) -> None:
    file, name = first_shard(folder, "lora_B")
    data = load_file(file)
    data[name] = data[name][:-1].clone()
    save_file(data, file)


def not_a_number(folder: Path) -> None:
    file, name = first_shard(folder, "weight_values")
    data = load_file(file)
    data[name][3] = torch.nan
    save_file(data, file)


def other_rank(folder: Path) -> None:
    edit_config(folder, modules={})


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (newer, "format version 2"),
        (more_bits, "bitmask marks"),
        (shorter_file, "shorter than its header says"),
        (smaller_factor, "do not fit together"),
        (not_a_number, "NaN or infinite"),
        (other_rank, "differ in which layers are compressed"),
    ],
)
def test_damaged_folders(copy: Path, tmp_path: Path, to: str, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    before = sorted(p.name for p in tmp_path.iterdir())
    expected = message if to != "semi-structured" or damage not in (more_bits, not_a_number) else "BF16 and F16"
    with pytest.raises(MendError, match=expected):
        mendlm.export(copy, tmp_path / "deep" / "out", to)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_what_is_not_a_compressed_folder(tiny_llama: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not compressed by mendlm"):
        mendlm.export(tiny_llama, tmp_path / "out")
    with pytest.raises(UsageError, match="is not a folder"):
        mendlm.export(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UsageError, match="unknown layout"):
        mendlm.export(packed, tmp_path / "out", "onnx")
    with pytest.raises(UsageError, match="for the layout 'peft'"):
        mendlm.export(packed, tmp_path / "out", "dense", uniform_rank=8)
    with pytest.raises(UsageError, match="cannot read"):
        mendlm.export(packed, tmp_path / "out", evaluations=[tmp_path / "none.json"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("safetensors-factored", "is an export in the layout 'factored', which only programs of your own read"),
        ("peft", "is a PEFT adapter .*Load it with PEFT"),
    ],
)
def test_an_export_that_is_no_model_is_called_that(packed: Path, tmp_path: Path, to: str, message: str) -> None:
    mendlm.export(packed, tmp_path / "out", to)
    for use in (mendlm.load, inspect, mendlm.bench, lambda folder: mendlm.export(folder, tmp_path / "again")):
        with pytest.raises(UsageError, match=message):
            use(tmp_path / "out")


def test_transformers_says_what_an_export_is_too(packed: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert set(EXPORTED) == {layout.mark for layout in LAYOUTS.values() if layout.mark is not None}
    mendlm.export(packed, tmp_path / "out", "safetensors-factored")
    with pytest.raises(UsageError, match="is an export in the layout 'factored'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_a_layout_cannot_hold(make_tiny_llama: Callable[..., Path], packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"stored as F32.*--dtype bfloat16"):
        mendlm.export(packed, tmp_path / "out", "semi-structured")
    model = make_tiny_llama(dtype=torch.bfloat16)
    mendlm.compress(model, tmp_path / "half", Recipe(pattern=Unstructured(0.5), refiner=TLR(rank=2, n_iter=4)))
    with pytest.raises(UsageError, match=r"multiples of 32×64|not 2:4"):
        mendlm.export(tmp_path / "half", tmp_path / "out", "semi-structured")
    mendlm.compress(model, tmp_path / "pruned", Recipe(pattern=NM(2, 4), refiner=mendlm.PruneOnly()))
    with pytest.raises(UsageError, match="no adapter to write"):
        mendlm.export(tmp_path / "pruned", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_experts_cannot_go_to_peft(tmp_path: Path) -> None:
    fields = dict(num_local_experts=4, num_experts_per_tok=2)
    tiny_model("MixtralForCausalLM", **fields).save_pretrained(tmp_path / "model")
    mendlm.compress(tmp_path / "model", tmp_path / "packed", Recipe(pattern=NM(2, 4), refiner=TLR(rank=2, n_iter=4)))
    with pytest.raises(UsageError, match=r"expert.*3-D tensor.*--to dense"):
        mendlm.export(tmp_path / "packed", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
DEEPSEEK = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, num_key_value_heads=4
) | dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1)


@pytest.mark.parametrize(
    ("kind", "fields", "shared", "n_parameters"),
    [
        ("Qwen2MoeForCausalLM", MOE | dict(shared_expert_intermediate_size=32), "*.shared_expert.*", 6),
        ("Qwen3MoeForCausalLM", MOE | dict(mlp_only_layers=[0]), "*.layers.0.mlp.*", 3),
        ("DeepseekV3ForCausalLM", DEEPSEEK | dict(first_k_dense_replace=1), "*.mlp.shared_experts.*", 3),
        ("BeamForCausalLM", dict(head_dim=16), "*.gate_proj.weight", 4),  # of attention too, in a model without experts
    ],
)
def test_layers_that_peft_takes_for_experts(
    kind: str, fields: dict[str, Any], shared: str, n_parameters: int, tmp_path: Path
) -> None:
    """They are adapted by their parameter; as modules PEFT would adapt the experts instead, and leave S alone."""
    from transformers import AutoModelForCausalLM

    tiny_model(kind, **fields).save_pretrained(tmp_path / "model")
    attention = "*.self_attn.o_proj.weight"
    recipe = Recipe(
        pattern=NM(2, 4),
        refiner=TLR(rank=2, n_iter=4),
        include=(shared, attention),
        overrides=[{"match": attention, "rank": 3}],
    )
    mendlm.compress(tmp_path / "model", tmp_path / "packed", recipe)
    mendlm.export(tmp_path / "packed", tmp_path / "peft", "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 2
    assert len(config["target_parameters"]) == n_parameters
    assert set(config["rank_pattern"]) == set(config["target_parameters"])
    expected = logits(mendlm.load(tmp_path / "packed", runtime="factored"))
    assert_close(logits(load_with_peft(tmp_path / "peft")), expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "peft" / "base")
    assert float((logits(base) - expected).abs().max()) > 1e-3 * float(expected.abs().max())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.load_adapter(str(tmp_path / "peft"))
    assert_close(logits(base), expected)


def test_peft_names_modules_only_where_it_takes_none_for_experts(packed: Path, tmp_path: Path) -> None:
    mendlm.export(packed, tmp_path / "peft", "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert "target_parameters" not in config
    assert any(target.endswith(".gate_proj") for target in config["target_modules"])


def test_a_failing_write_leaves_nothing(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mendlm.exporting.dense import Dense

    def fail(self: Dense, layer: Layer) -> Any:
        raise CheckpointError("broken")

    monkeypatch.setattr(Dense, "tensors", fail)
    with pytest.raises(CheckpointError, match=r"broken \[model"):
        mendlm.export(packed, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command_line(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(packed), str(tmp_path / "out"), "--to", "dense", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["layout"] == "dense"
    assert shown["output_bytes"] == shown["dense_bytes"]
    assert main(["export", str(packed), str(tmp_path / "out"), "--to", "dense"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["export", str(packed), str(tmp_path / "two"), "--to", "peft", "--uniform-rank", "x"]) == 2
    assert "--uniform-rank" in capsys.readouterr().err
    assert main(["export", str(packed), str(tmp_path / "two"), "--to", "peft", "--uniform-rank", "8"]) == 0
    assert "layers" in capsys.readouterr().out


def test_a_saved_model_can_be_exported(packed: Path, tmp_path: Path) -> None:
    """`save_pretrained` writes no mendlm.json; the tensors are enough."""
    model = mendlm.load(packed, runtime="packed")
    model.save_pretrained(tmp_path / "saved")
    byte_tokenizer().save_pretrained(tmp_path / "saved")
    mendlm.export(tmp_path / "saved", tmp_path / "dense")
    assert torch.equal(logits(mendlm.load(tmp_path / "dense")), logits(mendlm.load(packed)))
    assert "## Recipe" not in (tmp_path / "dense" / "README.md").read_text()


def test_sizes_where_nothing_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(pattern=Unstructured(1.0), refiner=TLR(rank=2, n_iter=1))
    mendlm.compress(tiny_llama, tmp_path / "packed", recipe)
    result = mendlm.export(tmp_path / "packed", tmp_path / "dense")
    assert result.dense_bytes == result.output_bytes


@pytest.mark.parametrize("to", ["dense", "peft", "safetensors-factored"])
def test_shards_that_are_left_without_tensors(packed: Path, tmp_path: Path, to: str) -> None:
    """`save_pretrained` may put a bitmask or a factor into a file of its own, of which the export keeps nothing."""
    from transformers import AutoModelForCausalLM

    mendlm.load(packed, runtime="packed").save_pretrained(tmp_path / "saved", max_shard_size="2KB")
    mendlm.export(tmp_path / "saved", tmp_path / "out", to)
    checkpoint = tmp_path / "out" / ("base" if to == "peft" else "")
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    written = {path.name for path in checkpoint.glob("model*.safetensors")}
    assert set(index.values()) == written
    assert written < {path.name for path in (tmp_path / "saved").glob("model*.safetensors")}
    assert index.keys() == tensors(checkpoint).keys()
    expected = logits(mendlm.load(packed))
    if to == "dense":
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(checkpoint)), expected)
    elif to == "peft":
        assert_close(logits(load_with_peft(tmp_path / "out")), expected)


def test_the_fine_tuning_example(packed: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    script = Path(__file__).resolve().parents[1] / "examples" / "finetune_adapter.py"
    command = [sys.executable, script, packed, text, "--seqlen", "64", "--lr", "0.01", "--out", tmp_path / "peft"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = (float(x) for x in re.findall(r"held-out loss (\S+) -> (\S+)", done.stdout)[0])
    assert after < before
    assert "all kept" in done.stdout
    trained = logits(load_with_peft(tmp_path / "peft"))
    assert not torch.equal(trained, logits(mendlm.load(packed)))
