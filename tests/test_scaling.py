"""The simulation of docs/scaling.md against cases worked out by hand, and the random checkpoint it is measured on."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mendlm import TLR, Recipe, Unstructured
from mendlm.cli import main
from mendlm.pipeline import plan

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    return module("scaling")


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = module("llama_shape")
    folder = tmp_path_factory.mktemp("scaling") / "llama"
    shape.write(folder, shape.Llama(hidden=64, intermediate=96, heads=4, kv=32, blocks=2, vocab=50), seed=3)
    return folder


def module(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def tasks(scaling: ModuleType, *seconds: float, n_bytes: float = 10.0) -> list:
    return [scaling.Task(s, n_bytes) for s in seconds]


def test_one_worker_takes_the_sum(scaling: ModuleType) -> None:
    found = scaling.simulate(tasks(scaling, 3, 5, 2), 1)
    assert (found.makespan, found.efficiency, found.tail, found.blocked) == (10, 1, 0, 0)


@pytest.mark.parametrize("n_workers", [3, 7])
def test_as_many_workers_as_tasks_take_the_longest(scaling: ModuleType, n_workers: int) -> None:
    found = scaling.simulate(tasks(scaling, 3, 5, 2), n_workers)
    assert found.makespan == 5
    assert found.efficiency == pytest.approx(10 / (5 * n_workers))
    assert found.tail == (3 if n_workers == 3 else 5)  # from the end of the shortest, or from the start


def test_longest_first(scaling: ModuleType) -> None:
    assert scaling.simulate(tasks(scaling, 1, 1, 1, 1, 4), 2).makespan == 4  # in the order given it would be 6


def test_slow_writer_is_the_limit(scaling: ModuleType) -> None:
    # Results are there at 1, 1, …; 8 of 10 bytes at 2 bytes per second take 40 s, after the first second.
    found = scaling.simulate(tasks(scaling, *[1] * 8), 4, rate=2.0)
    assert found.makespan == 41
    assert found.writer_busy == pytest.approx(40 / 41)
    # Workers wait, with one result each: for their first 0, 5, 10, 15 s, and for their second 19 s, all four, as
    # results are taken in turn, one each 5 s.
    assert found.blocked == pytest.approx((0 + 5 + 10 + 15 + 4 * 19) / (4 * 41))


def test_queue_takes_results_off_the_workers(scaling: ModuleType) -> None:
    found = scaling.simulate(tasks(scaling, *[1] * 8), 4, rate=2.0, queue=8)
    assert (found.makespan, found.blocked) == (41, 0)


def test_dense_tensors_are_written_first(scaling: ModuleType) -> None:
    assert scaling.simulate(tasks(scaling, 4, n_bytes=6.0), 1, rate=2.0, copied_bytes=10.0).makespan == 5 + 4 + 3


def test_lost_worker_costs_its_task_and_a_restart(scaling: ModuleType) -> None:
    one = tasks(scaling, 8, 4)
    assert scaling.simulate(one, 1, losses={0: 0.5}, restart=3).makespan == 4 + 3 + 8 + 4
    # With two: the short one is done at 4, when the long one is lost; the worker that is free takes it.
    assert scaling.simulate(one, 2, losses={0: 0.5}, restart=3).makespan == 12
    assert scaling.simulate(one, 2, losses={0: 0.5}, restart=300).makespan == 12


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    seconds=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    n_workers=st.integers(1, 6),
    rate=st.sampled_from([1.0, 3.0, 40.0]),
    queue=st.integers(0, 3),
)
def test_bounds(scaling: ModuleType, seconds: list[int], n_workers: int, rate: float, queue: int) -> None:
    one = tasks(scaling, *seconds)
    found = scaling.simulate(one, n_workers, rate=rate, queue=queue)
    writing = 10 * len(seconds) / rate
    floor = max(sum(seconds) / n_workers, max(seconds), writing)
    assert floor <= found.makespan * (1 + 1e-9)
    assert found.makespan <= (sum(seconds) + writing) * (1 + 1e-9)
    assert 0 <= found.blocked < 1
    assert 0 < found.efficiency <= 1 + 1e-9


def test_crossing_is_where_results_outrun_the_writer(scaling: ModuleType) -> None:
    one = tasks(scaling, *[2.0] * 4000)  # a worker makes 5 bytes per second
    n = scaling.crossing(one, 500.0)
    assert n == 100
    below, above = (scaling.simulate(one, round(n * times), rate=500.0, queue=1000) for times in (0.5, 2))
    assert below.writer_busy == pytest.approx(80 / 161)  # 80 rounds of 2 s, and 1 s for the last results
    assert above.writer_busy == pytest.approx(80 / 82)  # it waits for the first results, and then never


def test_losses_are_drawn_by_the_length_of_a_task(scaling: ModuleType) -> None:
    many = tasks(scaling, *[10.0] * 20000)
    losses = scaling.draw_losses(many, 100.0)
    assert len(losses) / 20000 == pytest.approx(0.0952, abs=0.01)  # 1 - exp(-10 / 100)
    assert all(0 < share < 1 for share in losses.values())
    assert losses == scaling.draw_losses(many, 100.0)


def test_model_tasks(scaling: ModuleType) -> None:
    refiner = TLR(128)
    measured = {"4096x4096": 20.0, "11008x4096": 60.0, "4096x11008": 70.0}
    small = scaling.model_tasks(scaling.LLAMA_7B, refiner, measured)
    assert len(small) == 224
    assert sum(task.seconds for task in small) == 32 * (4 * 20 + 2 * 60 + 70)
    large = scaling.model_tasks(scaling.LLAMA_70B, refiner, measured)
    assert len(large) == 560
    slowest = scaling.flops(4096, 11008, refiner) / 70
    assert max(task.seconds for task in large) == pytest.approx(scaling.flops(28672, 8192, refiner) / slowest)


def test_random_checkpoint_opens_and_stores_what_the_model_says(
    scaling: ModuleType, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = plan(tiny_llama, Recipe(pattern=Unstructured(0.5), refiner=TLR(8)))
    assert len(planned.compressed) == 14
    for tensor in planned.compressed:
        assert tensor.dtype == "bfloat16"
        assert tensor.stored_bytes == scaling.stored_bytes(*tensor.shape, 8)
    shapes = {tensor.name: tensor.shape for tensor in planned.compressed}
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (32, 64)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (64, 96)
    assert main(["compress", str(tiny_llama), str(tiny_llama.parent / "out"), "--rank", "8", "--dry-run"]) == 0
    assert "14" in capsys.readouterr().out


def test_random_checkpoint_has_outlier_columns_and_is_repeated(tiny_llama: Path, tmp_path: Path) -> None:
    shape = module("llama_shape")
    again = tmp_path / "again"
    shape.write(again, shape.Llama(hidden=64, intermediate=96, heads=4, kv=32, blocks=2, vocab=50), seed=3)
    for file in sorted(tiny_llama.iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes()
    W = shape.matrix(300, 400, torch.Generator().manual_seed(0))
    norms = torch.linalg.vector_norm(W, dim=0)
    assert int((norms > 5 * norms.median()).sum()) == 2  # one in 200
    first = load_file(tiny_llama / "model-00001-of-00004.safetensors")["model.embed_tokens.weight"]
    assert (first.shape, first.dtype) == ((50, 64), torch.bfloat16)
    with pytest.raises(SystemExit, match="not empty"):
        shape.write(again, shape.LLAMA_7B)
