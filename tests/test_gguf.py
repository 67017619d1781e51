"""GGUF import: tiny files written here with the `gguf` package, and the real SmolLM2 file in a slow test."""

from __future__ import annotations

import json
import os
import stat
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mendlm.gguf
from mendlm.errors import CheckpointError, MissingDependencyError, NonFiniteError, StorageError, UsageError
from mendlm.gguf import ImportResult, import_gguf
from tiny import BOS, EOS, byte_letters, tiny_model

gguf = pytest.importorskip("gguf")

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
HEAD_DIM = {"llama": 16, "qwen2": 16, "qwen3": 128}  # transformers does not read qwen3's from GGUF: 128, its default
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def make_model(arch: str, *, tied: bool = True, rope: dict[str, Any] | None = None) -> Any:
    model = tiny_model(
        ARCHITECTURES[arch],
        seed=3,
        vocab_size=260,
        head_dim=HEAD_DIM[arch],
        tie_word_embeddings=tied,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases are all ones or zeros in a fresh model
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "embed" in name:
                parameter.mul_(20)
    return model


def permuted(W: Tensor, n_heads: int) -> Tensor:
    """What llama.cpp's converter does to q_proj and k_proj: in each head, two halves of rows become interleaved."""
    return W.reshape(n_heads, 2, W.shape[0] // n_heads // 2, *W.shape[1:]).transpose(1, 2).reshape(W.shape)


def write_gguf(path: Path, model: Any, arch: str, *, quantization: str = "F32", **changes: Any) -> Path:
    """A GGUF of `model` as llama.cpp writes it. `changes`: skip (tensor names), metadata, extra (tensors)."""
    config, writer = model.config, gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM[arch])
    writer.add_key_length(HEAD_DIM[arch])
    writer.add_value_length(HEAD_DIM[arch])
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*byte_letters(), "<s>", "</s>", "th", "he"])
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["t h", "h e"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    for add, value in changes.get("metadata", []):
        getattr(writer, add)(value)
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), config.num_hidden_layers)
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    for name, W in model.state_dict().items():
        module, kind = name.rsplit(".", 1)
        if (config.tie_word_embeddings and module == "lm_head") or name in changes.get("skip", ()):
            continue
        n_heads = next((n for part, n in heads.items() if part in name), None)
        W = permuted(W, n_heads) if arch == "llama" and n_heads else W
        target = gguf.GGMLQuantizationType[quantization if W.ndim == 2 else "F32"]
        writer.add_tensor(
            f"{table.get_name(module)}.{kind}", gguf.quantize(W.contiguous().numpy(), target), raw_dtype=target
        )
    for name, W in changes.get("extra", {}).items():
        writer.add_tensor(name, W.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama_model() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def llama_file(llama_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good tiny file. Read only."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama_model, "llama")


def logits(model: Any) -> Tensor:
    ids = torch.arange(48)[None] * 5 % 256
    with torch.inference_mode():
        return model(ids).logits


def load(folder: Path, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values())
    return model


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_float32_file_gives_the_model_it_was_made_of(arch: str, tied: bool, tmp_path: Path) -> None:
    model = make_model(arch, tied=tied)
    result = import_gguf(write_gguf(tmp_path / "tiny.gguf", model, arch), tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=0.0, atol=0.0)
    assert isinstance(result, ImportResult)
    assert (result.verified_against, result.architecture, result.dtype) == ("gguf package", arch, "float32")
    assert (result.max_abs_difference, result.max_rounding) == (0.0, 0.0)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert (result.n_tensors, result.n_parameters) == (len(stored), sum(W.numel() for W in stored.values()))
    assert ("lm_head.weight" in stored) is not tied
    assert left_behind(tmp_path) == ["out", "tiny.gguf"]


def test_the_folder_is_an_ordinary_checkpoint(llama_file: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    old = os.umask(0o027)
    try:
        result = import_gguf(llama_file, tmp_path / "deep" / "er" / "out")
    finally:
        os.umask(old)
    folder = result.path
    assert folder == tmp_path / "deep" / "er" / "out"
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    assert "quantization_config" not in config
    assert not [key for key in config if key.startswith("_")]
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= {p.name for p in folder.iterdir()}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("the hat", add_special_tokens=False)["input_ids"]) == "the hat"
    assert result.output_bytes == (folder / "model.safetensors").stat().st_size
    assert result.source_bytes == llama_file.stat().st_size
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantized_files_are_dequantized_exactly(llama_model: Any, quantization: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama_model, "llama", quantization=quantization)
    assert import_gguf(file, tmp_path / "out").max_rounding == 0.0
    stored, true = load_file(tmp_path / "out" / "model.safetensors"), llama_model.state_dict()
    name = "model.layers.1.self_attn.k_proj.weight"
    kind = gguf.GGMLQuantizationType[quantization]
    rounded = torch.from_numpy(gguf.dequantize(gguf.quantize(true[name].numpy(), kind), kind))
    # Rows are quantized one by one, so the converter's reordering of rows does not change their values.
    torch.testing.assert_close(stored[name], rounded, rtol=0.0, atol=0.0)
    assert not torch.equal(stored[name], true[name])


def test_storing_in_bfloat16_rounds_once_and_says_how_much(llama_model: Any, llama_file: Path, tmp_path: Path) -> None:
    result = import_gguf(llama_file, tmp_path / "out", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    true = llama_model.state_dict()
    for name, W in stored.items():
        torch.testing.assert_close(W, true[name].to(torch.bfloat16), rtol=0.0, atol=0.0)
    largest = max(float((W.float() - true[name]).abs().max()) for name, W in stored.items())
    assert result.max_rounding == largest > 0
    assert (result.dtype, result.max_abs_difference) == ("bfloat16", 0.0)


def test_llama3_rotary_factors_reach_the_config(tmp_path: Path) -> None:
    model = make_model("llama", rope=LLAMA3_ROPE)
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = plain / model.model.rotary_emb.inv_freq  # as llama.cpp stores them
    assert 1.0 < float(factors.max()) <= 8.0
    file = write_gguf(tmp_path / "tiny.gguf", model, "llama", extra={"rope_freqs.weight": factors.float()})
    import_gguf(file, tmp_path / "out")
    imported = load(tmp_path / "out")
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        imported.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=8 * eps, atol=0
    )
    odd = write_gguf(tmp_path / "odd.gguf", model, "llama", extra={"rope_freqs.weight": torch.linspace(1, 3, 8)})
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight in 'odd.gguf' .* is not the rotary scaling"):
        import_gguf(odd, tmp_path / "odd")
    assert left_behind(tmp_path) == ["odd.gguf", "out", "tiny.gguf"]


def test_other_architectures_are_compared_with_the_model_in_memory(
    llama_model: Any, llama_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mendlm._gguf_file.PERMUTED", {})  # as if the layout of llama were not known
    result = import_gguf(llama_file, tmp_path / "out")
    assert (result.verified_against, result.max_rounding) == ("model in memory", None)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(llama_model), rtol=0.0, atol=0.0)


def test_a_wrong_tensor_in_the_checkpoint_is_found(
    llama_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, name = mendlm.gguf._compare, "model.layers.0.mlp.up_proj.weight"

    def damaged(folder: Path, *args: Any) -> Any:
        tensors = load_file(folder / "model.safetensors")
        tensors[name][3, 5] += 0.25
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return compare(folder, *args)

    monkeypatch.setattr(mendlm.gguf, "_compare", damaged)
    with pytest.raises(CheckpointError, match=rf"'{name}' differs from the file in 1 of 6144 entries, by up to 0.25"):
        import_gguf(llama_file, tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_a_wrong_permutation_would_be_found(llama_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mendlm._gguf_file.PERMUTED, "llama", False)
    with pytest.raises(CheckpointError, match=r"self_attn.k_proj.weight' differs from the file"):
        import_gguf(llama_file, tmp_path / "out")


def test_tensors_lost_on_the_way_are_named(llama_model: Any, tmp_path: Path) -> None:
    extra = {"blk.0.attn_q.bias": torch.ones(64)}
    file = write_gguf(tmp_path / "more.gguf", llama_model, "llama", extra=extra)
    with pytest.raises(CheckpointError, match=r"its tensor 'blk.0.attn_q.bias' was not used"):
        import_gguf(file, tmp_path / "out")
    file = write_gguf(tmp_path / "less.gguf", llama_model, "llama", skip=["model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .* e.g. 'model.layers.1.mlp.up_proj.weight'"):
        import_gguf(file, tmp_path / "out")
    assert left_behind(tmp_path) == ["less.gguf", "more.gguf"]


def test_rotary_scaling_that_would_be_dropped_is_refused(llama_model: Any, tmp_path: Path) -> None:
    metadata = [("add_rope_scaling_type", gguf.RopeScalingType.YARN), ("add_rope_scaling_factor", 4.0)]
    file = write_gguf(tmp_path / "tiny.gguf", llama_model, "llama", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"scales its rotary embedding \(yarn, factor 4\)"):
        import_gguf(file, tmp_path / "out")


def test_files_that_are_no_gguf(llama_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "out")
    with pytest.raises(UsageError, match="is not a file"):
        import_gguf(tmp_path, tmp_path / "out")
    for content in (b"", b"GG", b"\x93NUMPY" + bytes(100)):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(UsageError, match=r"x.gguf' is not a GGUF file: it starts with"):
            import_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert left_behind(tmp_path) == ["x.gguf"]


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.05, 0.5, 0.999])
def test_truncated_files_are_refused_before_anything_is_written(llama_file: Path, tmp_path: Path, share: float) -> None:
    whole = llama_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: max(8, int(share * len(whole)))])
    with pytest.raises(CheckpointError, match=r"cut.gguf' is not a whole GGUF file \(\d+ bytes\).*fetch it again"):
        import_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert left_behind(tmp_path) == ["cut.gguf"]


def test_unknown_architecture_and_metadata_alone(llama_model: Any, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "meta.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="holds no tensors, only metadata"):
        import_gguf(tmp_path / "meta.gguf", tmp_path / "out")
    writer = gguf.GGUFWriter(tmp_path / "alien.gguf", "alien")
    writer.add_tensor("w", torch.ones(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"cannot import 'alien.gguf' \(architecture 'alien'\)"):
        import_gguf(tmp_path / "alien.gguf", tmp_path / "out")
    assert left_behind(tmp_path) == ["alien.gguf", "meta.gguf"]


@pytest.fixture
def replacing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is written again takes the place of the first; text may stand where a number should."""
    add = gguf.GGUFWriter.add_key_value

    def replace(writer: Any, key: str, value: Any, kind: Any, *rest: Any, **more: Any) -> None:
        writer.kv_data[0].pop(key, None)
        add(writer, key, value, gguf.GGUFValueType.STRING if isinstance(value, str) else kind, *rest, **more)

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", replace)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (("add_head_count_kv", 0), "ZeroDivisionError"),  # of transformers' own reordering of k_proj
        (("add_rope_dimension_count", 0), "ZeroDivisionError"),
        (("add_layer_norm_rms_eps", "small"), "rms_norm_eps"),
        (("add_context_length", "long"), "max_position_embeddings"),
    ],
)
@pytest.mark.usefixtures("replacing")
def test_metadata_that_no_config_takes(
    llama_model: Any, tmp_path: Path, metadata: tuple[str, Any], message: str
) -> None:
    file = write_gguf(tmp_path / "odd.gguf", llama_model, "llama", metadata=[metadata])
    with pytest.raises(CheckpointError, match=rf"transformers cannot import 'odd\.gguf'.*{message}"):
        import_gguf(file, tmp_path / "out")
    assert left_behind(tmp_path) == ["odd.gguf"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (("add_rope_freq_base", 0.0), r"has 0 for llama\.rope\.freq_base, which must be above 0"),
        (("add_rope_freq_base", float("nan")), r"has nan for llama\.rope\.freq_base, which must be a finite number"),
        (("add_layer_norm_rms_eps", float("inf")), r"has inf for llama\.attention\.layer_norm_rms_epsilon"),
    ],
)
@pytest.mark.usefixtures("replacing")
def test_metadata_that_makes_a_model_of_nan(
    llama_model: Any, tmp_path: Path, metadata: tuple[str, Any], message: str
) -> None:
    file = write_gguf(tmp_path / "odd.gguf", llama_model, "llama", metadata=[metadata])
    with pytest.raises(CheckpointError, match=message):
        import_gguf(file, tmp_path / "out")
    assert left_behind(tmp_path) == ["odd.gguf"]


def test_values_that_no_dtype_or_this_dtype_cannot_hold(llama_model: Any, tmp_path: Path) -> None:
    model = deepcopy(llama_model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    file = write_gguf(tmp_path / "big.gguf", model, "llama")
    with pytest.raises(NonFiniteError, match=r"up_proj.weight': values up to 1e\+06 overflow torch.float16"):
        import_gguf(file, tmp_path / "out", dtype="float16")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    file = write_gguf(tmp_path / "nan.gguf", model, "llama")
    with pytest.raises(NonFiniteError, match=r"up_proj.weight': NaN or infinity in it"):
        import_gguf(file, tmp_path / "out")
    assert left_behind(tmp_path) == ["big.gguf", "nan.gguf"]


def test_dest_is_only_replaced_when_asked_and_a_checkpoint(llama_file: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"notes' holds no config.json, .* will not be overwritten"):
            import_gguf(llama_file, tmp_path / "notes", overwrite=overwrite)
    with pytest.raises(UsageError, match="file' is a file"):
        import_gguf(llama_file, tmp_path / "file", overwrite=True)
    first = import_gguf(llama_file, tmp_path / "empty")
    with pytest.raises(UsageError, match=r"empty' exists and is not empty\. Use --overwrite"):
        import_gguf(llama_file, tmp_path / "empty")
    (first.path / "stale.bin").write_text("x")
    import_gguf(llama_file, tmp_path / "empty", dtype="bfloat16", overwrite=True)
    assert not (first.path / "stale.bin").exists()
    assert load(first.path).dtype == torch.bfloat16
    inside = first.path / "tiny.gguf"
    inside.write_bytes(llama_file.read_bytes())
    with pytest.raises(UsageError, match="which --overwrite would remove"):
        import_gguf(inside, first.path, overwrite=True)
    assert left_behind(tmp_path) == ["empty", "file", "notes"]


def test_a_failure_leaves_the_old_checkpoint_and_no_new_parents(
    llama_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = import_gguf(llama_file, tmp_path / "out")

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(mendlm.gguf, "_compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_gguf(llama_file, old.path, dtype="bfloat16", overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        import_gguf(llama_file, tmp_path / "a" / "b" / "c")
    assert left_behind(tmp_path) == ["out"]
    assert load(old.path).dtype == torch.float32


def test_too_little_space_is_found_before_the_work(
    llama_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"needs \d+ bytes, only 1000 are free"):
        import_gguf(llama_file, tmp_path / "a" / "out")
    assert left_behind(tmp_path) == []


def test_unknown_dtype_and_missing_package(llama_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"unknown dtype 'bfloat6'. Did you mean 'bfloat16'\?"):
        import_gguf(llama_file, tmp_path / "out", dtype="bfloat6")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mendlm\[gguf\]'"):
        import_gguf(llama_file, tmp_path / "out")


def test_transformers_is_quiet_and_left_as_it_was(
    llama_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import modeling_gguf_pytorch_utils as legacy
    from transformers.utils import logging

    before = (logging.is_progress_bar_enabled(), logging.get_verbosity(), legacy.tqdm)
    import_gguf(llama_file, tmp_path / "out")
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity(), legacy.tqdm) == before
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
