"""The semi-structured runtime: who may have it, what "auto" means, and the products.

Without a CUDA device torch's conversion to its 2:4 layout and its padding run as they are, on the CPU; only the kernel
that multiplies is replaced.
"""

from __future__ import annotations

import copy
import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.sparse import SparseSemiStructuredTensorCUTLASS as Cutlass
from torch.sparse import _semi_structured_conversions as conversions

import mendlm
from mendlm import NM, Recipe, ZeroShotSVD
from mendlm._speed_worker import _bytes_by_storage
from mendlm.errors import UsageError
from mendlm.kernels import _cusparselt, semi_structured
from mendlm.packing import pack_mask
from mendlm.runtime import SparseLowRankLinear, resolve_runtime, runtime_on

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def two_of_four(d_out: int, d_in: int, g: torch.Generator) -> torch.Tensor:
    """A random mask that keeps at most two of four; some groups fewer."""
    order = torch.rand(d_out, d_in // 4, 4, generator=g).argsort(dim=2)
    kept = torch.randint(0, 3, (d_out, d_in // 4, 1), generator=g)
    return (order < kept).reshape(d_out, d_in)


def make_layer(
    d_out: int = 64,
    d_in: int = 128,
    rank: int = 3,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> SparseLowRankLinear:
    g = torch.Generator().manual_seed(0)
    mask = two_of_four(d_out, d_in, g)
    layer = SparseLowRankLinear(d_in, d_out, n_kept=int(mask.sum()), rank=rank, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight_bitmask.copy_(pack_mask(mask))
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
        layer.weight_values[5] = 0.0  # a kept entry may be zero
    layer.check()
    return layer.to(device).eval()


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of the Ampere generation, as far as questions go."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)


@pytest.fixture(params=["S alone", "B beside S"])
def on_cpu(request: pytest.FixtureRequest, capability: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for that device, and multiply there; with and without B in the semi-structured tensor."""
    if request.param == "B beside S":
        monkeypatch.setattr(semi_structured, "takes_B", lambda S, lora_B: lora_B.shape[1] > 0)
    obstacle = semi_structured.obstacle
    monkeypatch.setattr(semi_structured, "obstacle", lambda mask, d_in, dtype, _: obstacle(mask, d_in, dtype, CUDA))
    monkeypatch.setattr(Cutlass, "_validate_device_dim_dtype_shape", lambda S: None)

    def product(packed: torch.Tensor, meta: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        assert dense.shape[1] % 8 == 0  # what the kernel asks for; torch pads
        return conversions.sparse_semi_structured_to_dense_cutlass(packed, meta) @ dense

    def affine(b: torch.Tensor, packed: torch.Tensor, meta: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        return b[:, None] + product(packed, meta, dense)

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", product)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", affine)


def full_mask(d_out: int = 64, d_in: int = 128) -> torch.Tensor:
    return pack_mask(torch.arange(d_in).expand(d_out, d_in) % 4 < 2)


def with_three(mask: torch.Tensor, byte: int) -> torch.Tensor:
    mask = mask.clone()
    mask[3, 5] = byte
    return mask


@pytest.mark.parametrize("byte", [0b0000_0111, 0b1011_0000, 0b1111_1111])
def test_three_of_four_are_seen(byte: int) -> None:
    assert semi_structured.is_two_of_four(full_mask())
    assert semi_structured.is_two_of_four(with_three(full_mask(), 0b1001_0001))
    assert not semi_structured.is_two_of_four(with_three(full_mask(), byte))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": CPU}, "needs a CUDA device and the layer is on cpu: load it with device='cuda'"),
        ({"found": (7, 5)}, "needs compute capability 8.0 and cuda:0 has 7.5: use the runtime 'merged'"),
        ({"found": (9, 0)}, "no cuSPARSELt"),
        ({"dtype": torch.float32}, "needs bfloat16 or float16 and the weights are torch.float32"),
        ({"mask": full_mask(65)}, "multiples of 32 x 64 and S is 65 x 128"),
        ({"mask": full_mask(64, 96), "d_in": 96}, "multiples of 32 x 64 and S is 64 x 96"),
        ({"mask": with_three(full_mask(), 7)}, "more than two entries: compress with the pattern 2:4"),
        ({}, None),
    ],
    ids=lambda value: "" if value is None or isinstance(value, str) else ",".join(value),
)
def test_obstacles(
    capability: None, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], reason: str | None
) -> None:
    facts = {"mask": full_mask(), "d_in": 128, "dtype": torch.bfloat16, "device": CUDA, "found": (8, 0)} | changes
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: facts["found"])
    found = semi_structured.obstacle(facts["mask"], facts["d_in"], facts["dtype"], facts["device"])
    assert found is None if reason is None else reason in str(found)


def test_cusparselt_serves_newer_devices(capability: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert semi_structured.obstacle(full_mask(16, 16), 16, torch.float16, CUDA) is None


class OldLibrary:
    """One of version 0.5.1."""

    @staticmethod
    def cusparseLtGetProperty(kind: ctypes.c_int, found: Any) -> int:
        found._obj.value = (0, 5, 1)[kind.value]
        return 0


def test_plans_are_kept_with_a_known_library_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cusparselt, "_library", _cusparselt._library.__wrapped__)  # not what was found before
    monkeypatch.setattr(_cusparselt, "_LIBRARY", "no such library")
    assert not _cusparselt.available()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: OldLibrary)
    assert not _cusparselt.available()
    monkeypatch.setattr(_cusparselt, "OLDEST", 501)
    assert _cusparselt.available()


def test_auto(capability: None) -> None:
    good, bad = ("a", full_mask(), 128), ("b", with_three(full_mask(), 7), 128)
    assert resolve_runtime("auto") == "merged"
    for device in (CUDA, CPU):
        assert runtime_on("auto", [good, bad], torch.bfloat16, device) == "merged"
    assert runtime_on("semi-structured", [good, good], torch.bfloat16, CUDA) == "semi-structured"
    assert runtime_on("packed", [good], torch.bfloat16, CUDA) == "packed"
    with pytest.raises(UsageError, match="'b' cannot be semi-structured: some group"):
        runtime_on("semi-structured", [good, bad], torch.bfloat16, CUDA)


def test_refused_without_a_device() -> None:
    layer = make_layer()
    with pytest.raises(UsageError, match="the layer cannot become semi-structured: that needs a CUDA device"):
        layer.set_runtime("semi-structured")
    assert layer.runtime == "packed"
    layer(torch.ones(2, 128, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rank", "bias"), [(3, True), (0, False)])
@pytest.mark.parametrize("start", ["packed", "factored"])
@torch.no_grad()
def test_forward(on_cpu: None, dtype: torch.dtype, rank: int, bias: bool, start: str) -> None:
    check_forward(make_layer(rank=rank, bias=bias, dtype=dtype), start)


def check_forward(layer: SparseLowRankLinear, start: str) -> None:
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    factored = copy.deepcopy(layer)
    factored.set_runtime("factored")
    dense = (factored.S.double() + layer.lora_B.double() @ layer.lora_A.double()).cpu()
    layer.set_runtime(start)
    layer.set_runtime("semi-structured")
    dtype = layer.lora_A.dtype
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.double() @ dense.T + (layer.bias.double().cpu() if layer.bias is not None else 0)
    y = layer(x.to(layer.lora_A.device))
    size = float(x.abs().double().sum(dim=-1).max() * dense.abs().max()) + 4
    torch.testing.assert_close(y.cpu().double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * size)
    assert y.dtype == dtype
    assert layer(x[:0].to(layer.lora_A.device)).shape == (0, 5, 64)
    state = layer.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert all(torch.equal(t, before[name]) for name, t in layer.packed_tensors().items())


@torch.no_grad()
def test_converts_back_without_loss(on_cpu: None) -> None:
    for runtime in ("packed", "factored", "merged"):
        layer, expected = make_layer(), make_layer()
        layer.set_runtime("semi-structured")
        layer.set_runtime(runtime)
        expected.set_runtime(runtime)
        state = expected.state_dict()
        assert layer.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())
        assert not hasattr(layer, "_sparse")


def test_bench_counts_all_of_it(on_cpu: None) -> None:
    layer = make_layer()
    packed = sum(_bytes_by_storage(layer).values())
    layer.set_runtime("semi-structured")
    # 2:4 keeps half of the values, this mask at most that, and two bits for each entry are an eighth of its bytes.
    dense, B = 64 * 128 * 2, 64 * 3 * 2
    beside = 0 if layer._holds_B() else 9 * 64 * 64 * 2 // 16 - B
    others = sum(t.numel() * t.element_size() for t in (layer.weight_bitmask, layer.lora_A, layer.bias)) + B
    assert sum(_bytes_by_storage(layer).values()) == others + 9 * dense // 16 + beside
    assert packed < others + dense


@torch.no_grad()
def test_takes_packed_values(on_cpu: None) -> None:
    layer, other = make_layer(), make_layer()
    other.weight_values.neg_()
    layer.set_runtime("semi-structured")
    layer.load_state_dict(other.state_dict())
    other.set_runtime("semi-structured")
    x = torch.ones(2, 128, dtype=torch.bfloat16)
    assert torch.equal(layer(x), other(x))


@torch.no_grad()
def test_takes_a_part_of_its_state(on_cpu: None) -> None:
    layer, other = make_layer(), make_layer()
    layer.set_runtime("semi-structured")
    for name in ("lora_B", "weight_values"):
        getattr(other, name).neg_()
        layer.load_state_dict({name: getattr(other, name)}, strict=False)
        state = other.state_dict()
        assert all(torch.equal(t, state[key]) for key, t in layer.state_dict().items())


def test_factors_stay_as_trainable_as_they_were(on_cpu: None) -> None:
    layer = make_layer()
    layer.lora_B.requires_grad_(False)
    layer.set_runtime("semi-structured")
    layer.set_runtime("packed")
    assert not layer.lora_B.requires_grad
    assert layer.lora_A.requires_grad
    layer.lora_B.requires_grad_(True)
    layer.set_runtime("semi-structured")
    layer.set_runtime("factored")
    assert layer.lora_B.requires_grad


def test_gradients_are_refused(on_cpu: None) -> None:
    layer = make_layer()
    layer.set_runtime("semi-structured")
    y = layer(torch.ones(2, 128, dtype=torch.bfloat16))
    with pytest.raises(UsageError, match=r"has no gradients: call set_runtime\('factored'\)"):
        y.sum().backward()
    layer.requires_grad_(False)
    x = torch.ones(2, 128, dtype=torch.bfloat16)
    assert not layer(x).requires_grad
    with pytest.raises(UsageError, match="has no gradients"):
        layer(x.requires_grad_(True)).sum().backward()


def test_autocast(on_cpu: None) -> None:
    layer = make_layer()
    layer.set_runtime("semi-structured")
    x = torch.ones(2, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))


def test_stays_where_it_is(on_cpu: None) -> None:
    layer = make_layer()
    layer.set_runtime("semi-structured")
    layer.to("cpu")
    with pytest.raises(UsageError, match="keeps its device and dtype"):
        layer.float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model whose projections have the shapes that torch needs."""
    from tiny import tiny_model

    dense, out = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("2of4") / "out"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "tie_word_embeddings": False}
    tiny_model("LlamaForCausalLM", dtype=torch.bfloat16, **sizes).save_pretrained(dense)
    mendlm.compress(dense, out, Recipe(pattern=NM(2, 4), refiner=ZeroShotSVD(rank=4)))
    return out


IDS = torch.arange(20)[None]
TOLERANCE = 64 * torch.finfo(torch.bfloat16).eps


@torch.inference_mode()
@pytest.mark.usefixtures("on_cpu")
def test_load(folder: Path, tmp_path: Path) -> None:
    model = mendlm.load(folder, runtime="packed")
    mendlm.loading._convert(model, "semi-structured")
    merged = mendlm.load(folder).eval()
    expected = merged(IDS).logits.float()
    torch.testing.assert_close(
        model(IDS).logits.float(), expected, rtol=0, atol=TOLERANCE * float(expected.abs().max())
    )
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_load_chooses_before_it_loads(capability: None, folder: Path) -> None:
    choose = mendlm.loading._runtime_for
    assert choose(folder, "semi-structured", None, CUDA) == "semi-structured"
    assert choose(folder, "auto", None, CUDA) == "merged"
    assert choose(folder, "auto", None, CPU) == "merged"
    with pytest.raises(UsageError, match=r"'model\.layers\.0\..*' cannot be semi-structured: .*torch\.float32"):
        choose(folder, "semi-structured", torch.float32, CUDA)


def test_load_refuses_without_a_device(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"'model\.layers\.0\..*' cannot be semi-structured: that needs a CUDA device"):
        mendlm.load(folder, runtime="semi-structured")


def test_a_config_that_asks_for_it_is_refused_by_name(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {**config.quantization_config, "runtime": "semi-structured"}
    with pytest.raises(UsageError, match=r"needs a CUDA device .* \[model\.layers"):
        AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert "runtime" not in json.loads((folder / "config.json").read_text())["quantization_config"]


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_forward_on_the_device(dtype: torch.dtype) -> None:
    check_forward(make_layer(dtype=dtype, device="cuda"), "packed")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
@pytest.mark.parametrize("shape", [(2048, 1024), (1024, 2048)], ids=["up", "down"])
def test_large_layers_on_the_device(
    dtype: torch.dtype, bias: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer(*shape, rank=70, bias=bias, dtype=dtype, device="cuda")
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    layer.set_runtime("factored")
    n = 1030  # padded, and tried with every algorithm
    x = torch.randn(2, n // 2, shape[1], generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    expected = layer(x).double()
    layer.set_runtime("semi-structured")
    assert layer._holds_B() == (shape[0] < shape[1])
    assert all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())
    bound = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
    y = layer(x)
    assert (y - expected).abs().max() <= bound
    assert torch.equal(layer(x), y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = layer(x)
    graph.replay()
    assert torch.equal(replayed, y)
    for few in (1, 9, 1023):
        assert (layer(x[:, :few]) - expected[:, :few]).abs().max() <= bound
    monkeypatch.setattr(_cusparselt, "available", lambda: False)
    assert (layer(x) - expected).abs().max() <= bound


@gpu
@pytest.mark.gpu
@torch.inference_mode()
def test_generation_on_the_device(folder: Path) -> None:
    expected = mendlm.load(folder, runtime="merged", device="cuda")(IDS.cuda()).logits.float()
    for runtime in ("auto", "semi-structured", "packed", "factored"):
        model = mendlm.load(folder, runtime=runtime, device="cuda")
        found = model(IDS.cuda()).logits.float()
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
        assert model.generate(IDS.cuda(), max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 24)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, 64), (64, 128)], ids=["B beside S", "S alone"])
@torch.no_grad()
def test_compiles_on_the_device(shape: tuple[int, int]) -> None:
    layer = make_layer(*shape, device="cuda")
    layer.set_runtime("semi-structured")
    x = torch.ones(4, shape[1], dtype=torch.bfloat16, device="cuda")
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=0.02, atol=0.1)
