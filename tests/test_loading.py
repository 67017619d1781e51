"""Compressed folders in transformers: logits, generation, saving, refusal."""

from __future__ import annotations

import copy as copying
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

import mendlm
from mendlm import AcceleratedTLR, Recipe, Unstructured, refine, select_mask
from mendlm.errors import CheckpointError, MendError, UsageError
from mendlm.execution.tensor import tensor_generator
from tiny import CPU_RUNTIMES

EPS32 = torch.finfo(torch.float32).eps
RECIPE = {"pattern": Unstructured(0.5), "refiner": AcceleratedTLR(rank=4, n_iter=10)}


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loading") / "packed"
    mendlm.compress(tiny_llama, out, Recipe(**RECIPE))
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@pytest.fixture(scope="module")
def twin(tiny_llama: Path) -> torch.nn.Module:
    """The same compression by plain torch: a dense model whose projections hold S + B A."""
    model = mendlm.load(tiny_llama, dtype=torch.float32)
    for name, W in model.named_parameters():
        if name.endswith("_proj.weight"):
            mask = select_mask(W.data, "magnitude", RECIPE["pattern"])
            out = refine(W.data, mask, RECIPE["refiner"], generator=tensor_generator(0, name))
            W.data.copy_(out.decomposition.to_dense())
    return model


IDS = torch.arange(60)[None] * 4 % 256


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS.to(next(model.parameters()).device)).logits.float()


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_logits_equal_those_of_a_dense_model(twin: torch.nn.Module, packed: Path, runtime: str) -> None:
    model = mendlm.load(packed, runtime=runtime)
    layers = [m for name, m in model.named_modules() if name.endswith("_proj")]
    assert len(layers) == 14
    if runtime == "merged":
        assert {type(layer) for layer in layers} == {torch.nn.Linear}
    else:
        assert {layer.runtime for layer in layers} == {runtime}
    assert not any(module.training for module in model.modules())
    expected = logits(twin)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=256 * EPS32 * float(expected.abs().max()))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # tied as before


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_generation_works_in_every_runtime(twin: torch.nn.Module, packed: Path, runtime: str) -> None:
    prompt = torch.tensor([[256, 72, 101, 108]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 257}
    mask = torch.ones_like(prompt)
    expected = twin.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(mendlm.load(packed, runtime=runtime).generate(prompt, attention_mask=mask, **options), expected)


def test_auto_model_loads_after_the_import(packed: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(logits(model), logits(mendlm.load(packed)))


@pytest.mark.parametrize("runtime", ["factored", "packed"])
def test_saving_writes_the_same_packed_tensors(packed: Path, tmp_path: Path, runtime: str) -> None:
    model = mendlm.load(packed, runtime=runtime)
    model.save_pretrained(tmp_path)
    before, after = load_file(packed / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (packed, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(mendlm.load(tmp_path)), logits(mendlm.load(packed)))


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_torch_saves_what_a_model_holds_and_no_more(packed: Path, tmp_path: Path, runtime: str) -> None:
    """Each tensor has a storage of its own over the mapped file, which is neither copied nor written to."""
    before = (packed / "model.safetensors").read_bytes()
    model = mendlm.load(packed, runtime=runtime)
    expected, state = logits(model), model.state_dict()
    n_bytes = sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in state.values()}.values())
    torch.save(state, tmp_path / "state.pt")
    pickled = pickle.dumps(model)
    for size in ((tmp_path / "state.pt").stat().st_size, len(pickled)):
        assert size < 1.1 * n_bytes + 2000 * (len(state) + 100)  # names, headers and the modules
    save_model(model, tmp_path / "state.safetensors")
    for parameter in model.parameters():
        parameter.detach().zero_()
    model.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(pickle.loads(pickled)), expected)
    assert torch.equal(logits(copying.deepcopy(model)), expected)
    load_model(model, tmp_path / "state.safetensors")
    assert torch.equal(logits(model), expected)
    assert (packed / "model.safetensors").read_bytes() == before


def test_tensors_that_are_not_aligned_are_read(packed: Path, copy: Path) -> None:
    file = copy / "model.safetensors"
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    file.write_bytes((end - 8 + 1).to_bytes(8, "little") + raw[8:end] + b" " + raw[end:])
    assert torch.equal(logits(mendlm.load(copy, runtime="packed")), logits(mendlm.load(packed, runtime="packed")))


def test_a_merged_model_is_saved_dense(packed: Path, tmp_path: Path) -> None:
    model = mendlm.load(packed, runtime="merged")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert run_python(OPEN_PLAIN, tmp_path).returncode == 0  # no mendlm needed
    assert torch.equal(logits(mendlm.load(tmp_path)), logits(model))


@pytest.mark.parametrize("runtime", ["factored", "packed"])
def test_dequantize_merges(packed: Path, runtime: str) -> None:
    expected = logits(mendlm.load(packed))
    model = pickle.loads(pickle.dumps(mendlm.load(packed, runtime=runtime)))
    model.get_submodule("model.layers.1.mlp.up_proj").set_runtime("merged")
    assert model.dequantize() is model
    assert torch.equal(logits(model), expected)
    assert not model.is_quantized
    assert mendlm.load(packed, runtime=runtime).dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_an_offloaded_model_is_not_dequantized(packed: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}
    options = {"config": config_for(packed, "packed"), "device_map": places, "offload_folder": tmp_path}
    model = AutoModelForCausalLM.from_pretrained(packed, **options)
    expected = logits(model)
    with pytest.raises(UsageError, match="offloaded layers cannot become merged"):
        model.dequantize()
    assert torch.equal(logits(model), expected)  # all of it as it was


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's use of it
def test_a_merged_model_has_linear_layers_for_other_tools(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT and resizing go by the type of a module."""
    from peft import LoraConfig, get_peft_model

    recipe = Recipe(include=("*_proj.weight", "lm_head.weight"), **RECIPE)
    mendlm.compress(make_tiny_llama(tied=False), tmp_path / "out", recipe)
    model = mendlm.load(tmp_path / "out")
    expected = logits(model)
    for targets, n_adapted in ((["q_proj", "v_proj"], 4), ("all-linear", 14)):
        adapted = get_peft_model(copying.deepcopy(model), LoraConfig(r=2, target_modules=targets))
        assert sum(name.endswith(".lora_A.default") for name, _ in adapted.named_modules()) == n_adapted
        assert torch.equal(logits(adapted), expected)  # B is zero at first
    model.resize_token_embeddings(300)
    assert torch.equal(logits(model)[..., :258], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_in_memory(packed: Path, dtype: torch.dtype) -> None:
    model = mendlm.load(packed, runtime="packed", dtype=dtype)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.weight_values.dtype == layer.lora_A.dtype == dtype
    assert layer.weight_bitmask.dtype == torch.uint8
    expected = logits(mendlm.load(packed))
    bound = 64 * max(torch.finfo(dtype).eps, EPS32) * float(expected.abs().max())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("bfloat61", r"unknown dtype 'bfloat61'\. Did you mean 'bfloat16'"),
        (torch.int8, r"dtype must be a floating one .* got torch\.int8"),
        (torch.float8_e4m3fn, r"got torch\.float8_e4m3fn"),
    ],
)
def test_a_dtype_that_no_model_has_is_refused(packed: Path, tiny_llama: Path, dtype: object, message: str) -> None:
    for folder in (packed, tiny_llama):
        with pytest.raises(UsageError, match=message):
            mendlm.load(folder, dtype=dtype)


def test_a_dtype_has_a_name(packed: Path, tiny_llama: Path) -> None:
    assert mendlm.load(packed, dtype="bfloat16").dtype == torch.bfloat16
    assert mendlm.load(tiny_llama, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("compressed", [True, False])
def test_a_path_that_is_not_utf8_is_one_sentence(
    packed: Path, tiny_llama: Path, tmp_path: Path, compressed: bool
) -> None:
    """safetensors takes none."""
    try:
        folder = Path(shutil.copytree(packed if compressed else tiny_llama, tmp_path / "\udcff"))
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(CheckpointError, match="not valid UTF-8"):
        mendlm.load(folder)


@pytest.mark.parametrize("kind", [{"dtype": torch.bfloat16}, {"tied": False}, {"max_shard_size": "40KB"}], ids=str)
def test_other_checkpoints(make_tiny_llama: Callable[..., Path], tmp_path: Path, kind: dict[str, object]) -> None:
    source = make_tiny_llama(**kind)
    mendlm.compress(source, tmp_path / "out", Recipe(**RECIPE))
    seen = [logits(mendlm.load(tmp_path / "out", runtime=r, dtype=torch.float32)) for r in CPU_RUNTIMES]
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=0, atol=256 * EPS32 * float(seen[0].abs().max()))


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


OPEN_PLAIN = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "mendlm" not in sys.modules
print("opened")
"""
OPEN_WITH = """
import sys
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("opened", model.model.layers[0].mlp.up_proj.weight.count_nonzero().item())
"""


def test_without_mendlm_it_fails_loudly(packed: Path, tmp_path: Path) -> None:
    mendlm.load(packed, runtime="packed").save_pretrained(tmp_path)
    for folder in (packed, tmp_path):
        run = run_python(OPEN_PLAIN, folder)
        assert run.returncode != 0
        assert "opened" not in run.stdout
        assert "RuntimeError" in run.stderr
        assert "size mismatch" in run.stderr
        assert "got mendlm" in run.stderr  # transformers names the method it does not know


@pytest.mark.parametrize("imports", ["import mendlm", "import transformers\nimport mendlm", "import mendlm.errors"])
def test_any_order_of_imports_works(packed: Path, imports: str) -> None:
    run = run_python(OPEN_WITH.format(imports=imports), packed)
    assert run.stdout.strip() == f"opened {96 * 64}", run.stderr  # merged: no zeros are left
    assert "LOAD REPORT" not in run.stderr  # not a word about the guard


def test_importing_mendlm_imports_no_transformers() -> None:
    code = (
        "import mendlm, sys; heavy = {'transformers', 'pydantic', 'typer', 'pyarrow'} & set(sys.modules); print(heavy)"
    )
    assert run_python(code).stdout.strip() == "set()"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def test_another_version_is_refused(copy: Path) -> None:
    edit_config(copy, version=2)
    with pytest.raises(CheckpointError, match="version 2; this mendlm reads 'packed', version 1"):
        mendlm.load(copy)


def test_a_missing_tensor_is_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.lora_B"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.lora_B'"):
        mendlm.load(copy)


def test_a_damaged_bitmask_is_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_bitmask"][3, 3] ^= 2
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"entries as kept .* \[model\.layers\.1\.mlp\.up_proj\]"):
        mendlm.load(copy)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"n_kept": 5, "rank": 4}, r"weight_values' has shape \(3072,\), config.json and the model need \(5,\)"),
        ({"n_kept": 3072, "rank": 9}, r"lora_A' has shape \(4, 64\), config.json and the model need \(9, 64\)"),
        ({"rank": 4}, "n_kept and rank >= 0 are needed"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(copy: Path, facts: dict[str, int], message: str) -> None:
    modules = json.loads((copy / "config.json").read_text())["quantization_config"]["modules"]
    edit_config(copy, modules=modules | {"model.layers.0.mlp.up_proj": facts})
    with pytest.raises(CheckpointError, match=message):
        mendlm.load(copy)


def test_a_module_that_does_not_exist_is_refused(copy: Path) -> None:
    modules = json.loads((copy / "config.json").read_text())["quantization_config"]["modules"]
    edit_config(copy, modules=modules | {"model.layers.0.mlp.experts.0.w1": {"n_kept": 1, "rank": 1}})
    with pytest.raises(CheckpointError, match="no such module"):
        mendlm.load(copy)


def test_wrong_use_is_refused(tiny_llama: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        mendlm.load(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"is not a checkpoint"):
        mendlm.load(tmp_path)
    with pytest.raises(UsageError, match="is not compressed by mendlm"):
        mendlm.load(tiny_llama, runtime="packed")
    with pytest.raises(UsageError, match=r"unknown runtime 'fast'"):
        mendlm.load(packed, runtime="fast")


def test_the_home_folder_may_be_a_tilde(copy: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(copy.parent))
    assert torch.equal(logits(mendlm.load(f"~/{copy.name}")), logits(mendlm.load(packed)))
    assert mendlm.generate(Path("~") / copy.name, "a", max_new_tokens=1).n_new_tokens == 1
    with pytest.raises(UsageError, match=r"'~/nothing' is no folder"):
        mendlm.load("~/nothing")


def test_an_unreadable_dense_folder_is_one_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    with pytest.raises(MendError, match=r"transformers cannot open .* model type `unheard-of`"):
        mendlm.load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        UsageError, match=r"holds its weights as pickles only, e\.g\. 'pytorch_model\.bin'.*Convert once"
    ):
        mendlm.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match=r"is not a checkpoint: it holds neither model\.safetensors nor"):
        mendlm.load(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"intermediate_size": 80}, r"mlp\..*' in model\.safetensors has shape .*96.*, and the model of config"),
        ({"hidden_size": "64"}, r"cannot open .*Field 'hidden_size' expected int"),
    ],
)
def test_a_config_of_another_model_is_one_sentence(
    changes: dict[str, object], sentence: str, make_tiny_llama: Callable[..., Path]
) -> None:
    folder = make_tiny_llama(seed=6)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=sentence):
        mendlm.load(folder)


def test_a_layer_that_the_config_forgot_is_refused(copy: Path) -> None:
    modules = json.loads((copy / "config.json").read_text())["quantization_config"]["modules"]
    del modules["model.layers.1.mlp.up_proj"]
    edit_config(copy, modules=modules)
    with pytest.raises(CheckpointError, match=r"does not list 'model\.layers\.1\.mlp\.up_proj' as compressed"):
        mendlm.load(copy)


@pytest.mark.parametrize("modules", [None, {}, ["model.layers.0.mlp.up_proj"]], ids=str)
def test_a_config_without_modules_is_refused(copy: Path, modules: object) -> None:
    edit_config(copy, modules=modules)
    with pytest.raises(CheckpointError, match="it must name the compressed layers"):
        mendlm.load(copy)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_missing_tensor_of_another_kind_is_refused(tiny_llama: Path, packed: Path, tmp_path: Path, compressed: bool):
    folder = Path(shutil.copytree(packed if compressed else tiny_llama, tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .* 'model\.layers\.1\.input_layernorm\.weight'"):
        mendlm.load(folder)


def test_a_model_without_head_loads_and_saves(packed: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    config = config_for(packed, "packed")
    model = AutoModel.from_pretrained(packed, config=config)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)  # the embedding is tied, so nothing is lost
    assert torch.equal(logits(again), logits(mendlm.load(packed)))


@pytest.fixture(scope="module")
def with_head(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose output layer is compressed too; that one has the guard."""
    out = tmp_path_factory.mktemp("with-head") / "out"
    recipe = Recipe(include=("*_proj.weight", "lm_head.weight"), **RECIPE)
    mendlm.compress(make_tiny_llama(tied=False), out, recipe)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["guard"] == "lm_head.weight"
    return out


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForSequenceClassification"])
def test_a_compressed_head_is_passed_over(with_head: Path, tmp_path: Path, kind: str, runtime: str) -> None:
    import transformers

    config = config_for(with_head, runtime)
    config.pad_token_id = 0
    model = getattr(transformers, kind).from_pretrained(with_head, config=config).eval()
    model.save_pretrained(tmp_path)
    again = getattr(transformers, kind).from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        expected = mendlm.load(with_head).model(IDS).last_hidden_state
        for trunk in (model.base_model, again.base_model):
            got = trunk(IDS).last_hidden_state
            torch.testing.assert_close(got, expected, rtol=0, atol=256 * EPS32 * float(expected.abs().max()))
    if runtime != "merged":
        facts = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert len(facts["modules"]) == 14
        stored = load_file(tmp_path / "model.safetensors")
        assert stored[facts["guard"]].numel() == 0
        assert not any("lm_head" in name for name in (*stored, *facts["modules"]))


def test_a_head_that_is_alone_compressed_is_not_passed_over(
    make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModel

    mendlm.compress(make_tiny_llama(tied=False), tmp_path / "out", Recipe(include=("lm_head.weight",), **RECIPE))
    with pytest.raises(CheckpointError, match="'lm_head' but LlamaModel has no such module"):
        AutoModel.from_pretrained(tmp_path / "out")


def config_for(folder: Path, runtime: str):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["runtime"] = runtime
    return config


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_offloaded_layers_are_packed_or_refused(packed: Path, tmp_path: Path, runtime: str) -> None:
    from transformers import AutoModelForCausalLM

    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}
    options = {"config": config_for(packed, runtime), "device_map": places, "offload_folder": tmp_path}
    if runtime == "packed":
        model = AutoModelForCausalLM.from_pretrained(packed, **options)
        assert torch.equal(logits(model), logits(mendlm.load(packed, runtime="packed")))
    else:
        with pytest.raises(UsageError, match=f"offloaded layers cannot become {runtime}"):
            AutoModelForCausalLM.from_pretrained(packed, **options)


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_device_map_auto_works(packed: Path, runtime: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(packed, config=config_for(packed, runtime), device_map="auto")
    torch.testing.assert_close(logits(model), logits(mendlm.load(packed, runtime=runtime)))


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"], ids=str)
def test_what_transformers_says_of_the_keys(copy: Path, device_map: str | None) -> None:
    """Whoever fills the layers: no packed tensor is unexpected or missing, a stray or lost one is."""
    from transformers import AutoModelForCausalLM

    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.stray_proj.lora_A"] = torch.ones(2, 3)
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    options = {"config": config_for(copy, "packed"), "device_map": device_map}
    model, info = AutoModelForCausalLM.from_pretrained(copy, output_loading_info=True, **options)
    assert set(info["unexpected_keys"]) == {"model.layers.0.mlp.stray_proj.lora_A"}
    assert set(info["missing_keys"]) == {"model.norm.weight"}
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    for part in ("weight_values", "weight_bitmask", "lora_A", "lora_B"):
        assert torch.equal(getattr(layer, part), tensors[f"model.layers.0.mlp.up_proj.{part}"])
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_modules_kept_in_float32_stay_so(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers loads such layers itself, as it alone knows which dtype each tensor of them gets."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["down_proj"])
    model = mendlm.load(packed, runtime="packed", dtype=torch.bfloat16)
    block = model.model.layers[1].mlp
    assert (block.down_proj.lora_A.dtype, block.up_proj.lora_A.dtype) == (torch.float32, torch.bfloat16)
    assert not block.down_proj.weight_values.requires_grad


def test_an_output_layer_that_is_tied_is_refused(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Checkpoints may hold both tensors nevertheless."""
    source, out = make_tiny_llama(tied=False), tmp_path / "out"
    recipe = Recipe(include=("lm_head.weight",), **RECIPE)
    mendlm.compress(source, out, recipe)
    for folder in (source, out):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UsageError, match=r"'lm_head\.weight' is tied to the embedding"):
        mendlm.compress(source, tmp_path / "other", recipe)
    assert not (tmp_path / "other").exists()
    with pytest.raises(CheckpointError, match=r"layer 'lm_head' whose weight LlamaForCausalLM ties to the embedding"):
        mendlm.load(out)


def test_a_state_dict_is_refused(packed: Path) -> None:
    from transformers import LlamaForCausalLM

    state = load_file(packed / "model.safetensors")
    with pytest.raises(UsageError, match="not from a state_dict"):
        LlamaForCausalLM.from_pretrained(None, config=config_for(packed, "merged"), state_dict=state)


def test_a_runtime_that_transformers_would_ignore_is_refused() -> None:
    from mendlm.hf import MendlmConfig

    with pytest.raises(CheckpointError, match=r"call mendlm\.load\(folder, runtime="):
        MendlmConfig(runtime="packed")


def test_a_half_merged_model_is_not_saved(packed: Path, tmp_path: Path) -> None:
    model = mendlm.load(packed, runtime="packed")
    model.get_submodule("model.layers.1.mlp.up_proj").set_runtime("merged")
    with pytest.raises(UsageError, match=r"'model\.layers\.1\.mlp\.up_proj' is merged and the model is not"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_can_be_trained(packed: Path) -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    assert all(p.requires_grad for p in mendlm.load(packed).parameters())  # merged: an ordinary dense model
    factored = mendlm.load(packed, runtime="factored")
    validate_quantization_for_training(factored)
    assert {n.rpartition(".")[2] for n, p in factored.named_parameters() if not p.requires_grad} == {"S"}
    assert not factored.get_submodule("model.layers.0.mlp.up_proj").S.requires_grad


def test_transformers_is_as_it_was_after_loads_at_a_time() -> None:
    """Whichever of two ends first."""
    from transformers import modeling_gguf_pytorch_utils as legacy
    from transformers.utils import logging

    from mendlm._quiet import quiet_transformers

    def switches() -> tuple[object, ...]:
        return logging.get_verbosity(), logging.is_progress_bar_enabled(), getattr(legacy, "tqdm", None)

    before = switches()
    for first, second in ((0, 1), (1, 0)):
        both = quiet_transformers(), quiet_transformers()
        both[0].__enter__()
        quiet = switches()
        assert quiet[:2] == (logging.ERROR, False)
        both[1].__enter__()
        both[first].__exit__(None, None, None)
        assert switches() == quiet
        both[second].__exit__(None, None, None)
        assert switches() == before


def test_registration_survives_a_reload(packed: Path) -> None:
    reload = "import importlib, mendlm, transformers.quantizers.auto as auto\nimportlib.reload(auto)"
    assert run_python("import sys\n" + reload + "\nassert 'mendlm' in auto.AUTO_QUANTIZER_MAPPING").returncode == 0


def test_numpy_alone_can_read_the_format(packed: Path) -> None:
    tensors = {name: t.numpy() for name, t in load_file(packed / "model.safetensors").items()}
    model = mendlm.load(packed)
    for path in json.loads((packed / "config.json").read_text())["quantization_config"]["modules"]:
        A, B = tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]
        bits = np.unpackbits(tensors[f"{path}.weight_bitmask"], axis=1, bitorder="little")
        W = np.zeros((B.shape[0], A.shape[1]), A.dtype)
        W[bits[:, : A.shape[1]].astype(bool)] = tensors[f"{path}.weight_values"]
        expected = torch.from_numpy(W + B @ A)
        torch.testing.assert_close(model.get_submodule(path).weight.data, expected, rtol=8 * EPS32, atol=8 * EPS32)
