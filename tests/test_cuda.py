"""Whole runs on a CUDA device: what they give is what the CPU gives, and the same bytes every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mendlm
from faulting import bytes_of
from mendlm import NM, TLR, Recipe, Unstructured
from mendlm.config import Calibration, Matching
from mendlm.evaluation.perplexity import evaluate
from mendlm.packing import check_packed, pack_mask, scatter, unpack_mask
from mendlm.pipeline import CompressionResult, Event, TensorDone, compress
from mendlm.report.records import read_manifest
from mendlm.verifying import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TEXT = Calibration(source="random-tokens", n_sequences=8, seqlen=32, batch_size=4)
BASE: dict[str, Any] = {"pattern": NM(2, 4), "refiner": TLR(rank=4, n_iter=10)}
GRAM: dict[str, Any] = {"calibration": TEXT, "metric": "gram"}
ROWS: dict[str, Any] = {"pattern": Unstructured(0.5, "row"), "rank": 4, "calibration": TEXT}
RECIPES: dict[str, dict[str, Any]] = {
    "data-free": {},
    "data-free, accelerated": {"refiner": "accelerated-tlr", "rank": 4, "pattern": Unstructured(0.5)},
    "wanda, plain": {"criterion": "wanda", "calibration": TEXT},
    "wanda, diagonal": {"criterion": "wanda", "calibration": TEXT, "metric": "diagonal"},
    "ria, gram": {"criterion": "ria", **GRAM},
    "sparsegpt, accelerated, gram": {"criterion": "sparsegpt", "refiner": "accelerated-tlr", "rank": 4, **GRAM},
    "joint": {"refiner": "joint-admm", "rank": 4, **GRAM},
    "oats": {"refiner": "oats", "metric": "diagonal", **ROWS},
    "hassle-free": {"refiner": "hassle-free", "metric": "gram", **ROWS},
    "owl": {"criterion": "wanda", "layer_sparsity": "owl", "pattern": Unstructured(0.5, "row"), "calibration": TEXT},
    "matched": {**GRAM, "match_blocks": Matching(n_steps=20, lr=0.01)},
}


@pytest.fixture
def bf16_llama(make_tiny_llama: Any) -> Path:
    return make_tiny_llama(dtype=torch.bfloat16)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", RECIPES)
def test_runs_agree_with_the_cpu_and_repeat(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(**(BASE | RECIPES[name]))
    here = compress(tiny_llama, tmp_path / "cpu", recipe)
    there = compress(tiny_llama, tmp_path / "cuda", recipe, device="cuda")
    compress(tiny_llama, tmp_path / "again", recipe, device="cuda")
    assert bytes_of(tmp_path / "cuda") == bytes_of(tmp_path / "again")
    assert verify(tmp_path / "cuda", tiny_llama).ok
    # The subspace iteration starts from the device's random numbers: as with other seeds on a CPU, which were seen to
    # change the error of a single tiny tensor by 12 % and their mean by 1.5 %, results are close, not equal.
    assert [(r.name, r.n_kept) for r in there.records] == [(r.name, r.n_kept) for r in here.records]
    for field in ("rel_error", "rel_output_error"):
        errors = [[getattr(r, field) or 0.0 for r in run.records] for run in (here, there)]
        assert errors[1] == pytest.approx(errors[0], rel=0.15)
        assert sum(errors[1]) == pytest.approx(sum(errors[0]), rel=0.03)
    text = {"n_windows": 2, "seqlen": 64, "dtype": "float32"}
    found = [evaluate(tmp_path / d, device=d, **text).ppl for d in ("cpu", "cuda")]
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert read_manifest(there.out).matching or name != "matched"


def test_workers_and_resume_give_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    compress(tiny_llama, tmp_path / "one", Recipe(**BASE), device="cuda")
    compress(tiny_llama, tmp_path / "two", Recipe(**BASE), device="cuda", workers=2)
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")

    def stop(event: Event) -> None:
        if isinstance(event, TensorDone) and event.index == 9:
            raise KeyboardInterrupt

    for recipe, whole in ((Recipe(**BASE), "one"), (Recipe(**BASE, **GRAM), "walked")):
        if whole == "walked":
            compress(tiny_llama, tmp_path / whole, recipe, device="cuda")
        out = tmp_path / f"{whole}-resumed"
        with pytest.raises(KeyboardInterrupt):
            compress(tiny_llama, out, recipe, device="cuda", on_event=stop)
        result = compress(tiny_llama, out, recipe, device="cuda", resume=True)
        assert result.resumed == 9
        assert bytes_of(out) == bytes_of(tmp_path / whole)


def test_text_of_its_own(bf16_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(**BASE, criterion="wanda", calibration=Calibration(source="self", n_sequences=4, seqlen=32))
    results: list[CompressionResult] = [
        compress(bf16_llama, tmp_path / str(i), recipe, device="cuda") for i in range(2)
    ]
    assert bytes_of(results[0].out) == bytes_of(results[1].out)


def test_a_budget(tiny_llama: Path) -> None:
    base = Recipe(**BASE, **GRAM)
    here, there = (mendlm.plan_budget(tiny_llama, base, target_rank_bytes=0.1, device=d) for d in ("cpu", "cuda"))
    assert there.error == pytest.approx(here.error, rel=0.02)


@pytest.mark.parametrize("runtime", ["merged", "factored", "packed"])
def test_generation_and_its_speed(runtime: str, bf16_llama: Path, tmp_path: Path) -> None:
    compress(bf16_llama, tmp_path / "out", Recipe(**BASE), device="cuda")
    text = mendlm.generate(tmp_path / "out", "a word", max_new_tokens=8, device="cuda", runtime=runtime)
    assert text.settings["device"] == "cuda:0"
    assert text.settings["runtime"] == runtime
    result = mendlm.bench(
        tmp_path / "out",
        dense=bf16_llama,
        runtimes=[runtime],
        device="cuda",
        prompt_tokens=24,
        new_tokens=4,
        repeats=2,
    )
    for row in result.rows:
        assert row.unavailable is None
        assert row.peak_device_bytes is not None
        assert row.peak_device_bytes > 0


@pytest.mark.parametrize("d_in", [1, 20, 301])
def test_packing(d_in: int) -> None:
    mask = torch.rand(37, d_in, generator=torch.Generator().manual_seed(0)) < 0.5
    bitmask = pack_mask(mask.cuda())
    assert torch.equal(bitmask.cpu(), pack_mask(mask))
    assert torch.equal(unpack_mask(bitmask, d_in).cpu(), mask)
    values = torch.arange(int(mask.sum()), dtype=torch.float32)
    S = scatter(values.cuda(), bitmask, d_in)
    assert torch.equal(S.cpu(), scatter(values, pack_mask(mask), d_in))
    starts = check_packed(values.cuda(), bitmask, d_in)
    assert torch.equal(starts.cpu(), check_packed(values, pack_mask(mask), d_in))
