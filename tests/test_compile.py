"""torch.compile and the key-value cache, in every runtime."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import mendlm
from mendlm import Recipe, Unstructured, ZeroShotSVD
from test_runtime import make_layer
from tiny import CPU_RUNTIMES

EPS32 = torch.finfo(torch.float32).eps
IDS = torch.arange(12)[None] * 4


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compile") / "packed"
    mendlm.compress(tiny_llama, out, Recipe(pattern=Unstructured(0.5), refiner=ZeroShotSVD(rank=4)))
    return out


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
@torch.no_grad()
def test_a_compiled_model_gives_the_same_logits(packed: Path, runtime: str) -> None:
    model = mendlm.load(packed, runtime=runtime)
    expected = model(IDS, use_cache=False).logits
    torch._dynamo.reset()
    found = torch.compile(model, backend="aot_eager")(IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=64 * EPS32 * float(expected.abs().max()))


@pytest.mark.parametrize("runtime", CPU_RUNTIMES)
def test_the_cache_changes_no_token(packed: Path, runtime: str) -> None:
    model = mendlm.load(packed, runtime=runtime)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 257, "attention_mask": torch.ones_like(IDS)}
    cached, uncached = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("runtime", ["merged", "factored"])
def test_a_compiled_layer_is_one_graph(runtime: str) -> None:
    layer, _ = make_layer()
    layer.set_runtime(runtime)
    torch._dynamo.reset()
    x = torch.ones(3, 20, requires_grad=True)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, layer(x), rtol=0, atol=1e-4)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(x).sum(), x)[0], rtol=0, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@torch.no_grad()
def test_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer, _ = make_layer()
    layer.set_runtime("factored")
    torch._dynamo.reset()
    x = torch.ones(3, 20)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=0, atol=1e-4)
