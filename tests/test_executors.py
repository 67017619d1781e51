"""Executors: the same bytes from any number of workers, and what happens when a worker dies or hangs."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mendlm.execution.local as local_module
import mendlm.execution.tasks as tasks_module
from conftest import TinyLlama
from mendlm import TLR, AcceleratedTLR, PruneOnly, Recipe, ZeroShotSVD
from mendlm.checkpoints.plan import PlannedTensor
from mendlm.checkpoints.staging import has_partial
from mendlm.criteria import CRITERIA
from mendlm.devices import resolve_devices
from mendlm.errors import NonFiniteError, UsageError, WorkerError
from mendlm.execution import EXECUTORS, LocalExecutor, make_executor
from mendlm.execution.tasks import Task, as_tasks, one_thread
from mendlm.pipeline import Event, TensorDone, TensorStarted, compress, plan
from mendlm.refiners import REFINERS
from mendlm.verifying import verify

RECIPE = Recipe(refiner=TLR(rank=4, n_iter=2))
WEIGHTS = "model.safetensors"


def children() -> list[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()]


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("reference") / "out"
    compress(tiny_llama, out, RECIPE, workers=1)
    return (out / WEIGHTS).read_bytes()


def test_two_processes_write_the_same_bytes_and_tell_of_every_tensor(
    tiny_llama: Path, reference: bytes, tmp_path: Path
) -> None:
    events: list[Event] = []
    before = children()
    compress(tiny_llama, tmp_path / "out", RECIPE, workers=2, on_event=events.append)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == reference
    for kind in (TensorStarted, TensorDone):
        assert [e.index for e in events if isinstance(e, kind)] == list(range(1, 15))
    names = [e.name for e in events if isinstance(e, TensorStarted)]
    assert sorted(names) == sorted(e.record.name for e in events if isinstance(e, TensorDone))
    assert names[0].endswith("_proj.weight")
    assert ".mlp." in names[0]  # the largest first
    assert children() == before


def test_the_bytes_do_not_depend_on_the_threads_of_torch(tiny_llama: Path, reference: bytes, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        compress(tiny_llama, tmp_path / "out", RECIPE)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == reference


def test_a_killed_worker_costs_nothing(tiny_llama: Path, reference: bytes, tmp_path: Path) -> None:
    before, killed = children(), []

    def kill(event: Event) -> None:
        if isinstance(event, TensorDone) and not killed:
            killed.append(next(pid for pid in children() if pid not in before))
            os.kill(killed[0], signal.SIGKILL)

    compress(tiny_llama, tmp_path / "out", RECIPE, workers=2, on_event=kill)
    assert killed
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == reference


def test_a_tensor_that_takes_too_long_is_tried_again_and_then_named(tiny_llama: Path, tmp_path: Path) -> None:
    executor = LocalExecutor(task_timeout=1e-3)
    with pytest.raises(WorkerError, match=r"task timeout of 0.001 s.*try 3 of 3.*--resume.* \[model.layers.0"):
        compress(tiny_llama, tmp_path / "out", RECIPE, executor=executor)


def test_a_stopped_run_goes_on_with_another_number_of_workers(
    tiny_llama: Path, reference: bytes, tmp_path: Path
) -> None:
    before = children()

    def stop(event: Event) -> None:
        if isinstance(event, TensorDone) and event.index == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tiny_llama, tmp_path / "out", RECIPE, workers=2, on_event=stop)
    assert children() == before
    assert has_partial(tmp_path / "out")
    result = compress(tiny_llama, tmp_path / "out", RECIPE, workers=1, resume=True)
    assert result.resumed == 3
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == reference


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Let tensors be compressed together on the CPU, as they are on CUDA; what the tasks of the last run were."""
    seen: list[Task] = []

    def grouped(tensors: Iterable[PlannedTensor], recipe: Recipe, _: torch.device) -> list[Task]:
        seen[:] = as_tasks(tensors, recipe, torch.device("cuda"))
        return seen

    monkeypatch.setattr("mendlm.execution.tensors.as_tasks", grouped)
    return seen


def test_tensors_of_one_shape_are_together_on_cuda_alone(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = plan(tiny_llama, RECIPE).compressed
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert as_tasks(tensors, RECIPE, cpu) == [(tensor,) for tensor in tensors]
    tasks = as_tasks(tensors, RECIPE, cuda)
    assert sorted(tensor.name for task in tasks for tensor in task) == sorted(tensor.name for tensor in tensors)
    assert all(len({tensor.shape for tensor in task}) == 1 for task in tasks)
    assert len(tasks) == len({tensor.shape for tensor in tensors}) < len(tensors)
    assert [task[0] for task in tasks] == [tensor for tensor in tensors if any(tensor is task[0] for task in tasks)]
    for alone in (ZeroShotSVD(4), AcceleratedTLR(4), TLR(4, solver="exact"), PruneOnly()):
        assert all(len(task) == 1 for task in as_tasks(tensors, Recipe(refiner=alone), cuda))
    ranks = Recipe(refiner=TLR(4), overrides=[{"match": "*layers.0.*", "rank": 3}])
    assert max(len(task) for task in as_tasks(plan(tiny_llama, ranks).compressed, ranks, cuda)) < max(map(len, tasks))
    entries = max(prod(tensor.shape) for tensor in tensors)
    monkeypatch.setattr(tasks_module, "TASK_ENTRIES", 2 * entries)
    few = as_tasks(tensors, RECIPE, cuda)
    assert all(sum(prod(tensor.shape) for tensor in task) <= 2 * entries for task in few)
    assert len(few) > len(tasks)
    monkeypatch.setattr(tasks_module, "STACKED_ENTRIES", entries - 1)
    assert all(len(task) == 1 for task in as_tasks(tensors, RECIPE, cuda) if prod(task[0].shape) == entries)


def test_tensors_refined_together(
    tiny_llama: Path, stacked: list[Task], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    events: list[Event] = []
    result = compress(tiny_llama, tmp_path / "one", RECIPE, workers=1, on_event=events.append)
    assert max(map(len, stacked)) > 1
    for kind in (TensorStarted, TensorDone):
        assert [e.index for e in events if isinstance(e, kind)] == list(range(1, 15))
    assert verify(tmp_path / "one", tiny_llama).ok
    bytes_of_one = (tmp_path / "one" / WEIGHTS).read_bytes()
    compress(tiny_llama, tmp_path / "two", RECIPE, executor=LocalExecutor(workers=2, task_timeout=60))
    assert (tmp_path / "two" / WEIGHTS).read_bytes() == bytes_of_one
    monkeypatch.undo()
    alone = compress(tiny_llama, tmp_path / "alone", RECIPE, workers=1)
    assert [r.name for r in alone.records] == [r.name for r in result.records]
    errors = [[record.rel_error for record in run.records] for run in (result, alone)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_a_task_that_was_stopped_halfway_ends_with_the_same_bytes(
    tiny_llama: Path, stacked: list[Task], tmp_path: Path
) -> None:
    compress(tiny_llama, tmp_path / "whole", RECIPE, workers=1)
    halfway = len(stacked[0]) - 1
    assert halfway > 0

    def stop(event: Event) -> None:
        if isinstance(event, TensorDone) and event.index == halfway:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tiny_llama, tmp_path / "out", RECIPE, workers=1, on_event=stop)
    events: list[Event] = []
    result = compress(tiny_llama, tmp_path / "out", RECIPE, workers=1, resume=True, on_event=events.append)
    assert result.resumed == halfway
    for kind in (TensorStarted, TensorDone):
        assert [e.index for e in events if isinstance(e, kind)] == list(range(halfway + 1, 15))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_the_tensor_at_fault_in_a_task_is_named(
    make_tiny_llama: TinyLlama, stacked: list[Task], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_tiny_llama(), folder)
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for n, executor in enumerate((LocalExecutor(workers=1), LocalExecutor(workers=2))):
        with pytest.raises(NonFiniteError, match=rf"NaN.*\[{name} in"):
            compress(folder, tmp_path / f"out{n}", RECIPE, executor=executor)
    assert any(len(task) > 1 and name in {tensor.name for tensor in task} for task in stacked)


OWN_METHODS = """
from dataclasses import dataclass
from mendlm.criteria import Magnitude
from mendlm.refiners import ZeroShotSVD

class Smallest(Magnitude):
    name = "smallest"
    def scores(self, W, inputs, generator):
        return -W.abs()

class Mine(ZeroShotSVD):
    name = "mine"
"""


def test_methods_of_ones_own_are_known_to_the_workers(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_methods_of_a_test.py").write_text(OWN_METHODS)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_methods_of_a_test")
    monkeypatch.setitem(CRITERIA, "smallest", own.Smallest)
    monkeypatch.setitem(CRITERIA, "random", own.Smallest)  # in the place of mendlm's
    monkeypatch.setitem(REFINERS, "mine", own.Mine)
    recipe = Recipe(
        criterion="smallest", refiner="mine", rank=2, overrides=[{"match": "*.mlp.*", "criterion": "random"}]
    )
    for n in (1, 2):
        compress(tiny_llama, tmp_path / str(n), recipe, workers=n)
    assert (tmp_path / "2" / WEIGHTS).read_bytes() == (tmp_path / "1" / WEIGHTS).read_bytes()


def test_methods_that_workers_cannot_import(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(ZeroShotSVD):
        name = "mine"

    recipe = Recipe(refiner=Mine(rank=2))
    for executor in (LocalExecutor(workers=2), LocalExecutor(task_timeout=60.0)):
        with pytest.raises(
            UsageError, match=r"refiner 'mine' is defined in the program .* Put its class into a module"
        ):
            compress(tiny_llama, tmp_path / "out", recipe, executor=executor)
    assert not (tmp_path / "out").exists()
    assert not has_partial(tmp_path / "out")
    monkeypatch.setattr(local_module, "SMALL_ENTRIES", 0)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compress(tiny_llama, tmp_path / "out", recipe)
    finally:
        torch.set_num_threads(n_threads)
    assert json.loads((tmp_path / "out" / "mendlm.run.json").read_text())["n_workers"] == 1


def test_wrong_settings(tiny_llama: Path, tmp_path: Path) -> None:
    assert list(EXECUTORS) == ["local", "ray"]
    with pytest.raises(UsageError, match=r"workers must be 1 or more, got 0"):
        make_executor("local", workers=0)
    with pytest.raises(UsageError, match=r"task_timeout must be a positive number of seconds, got -1"):
        make_executor("local", task_timeout=-1)
    with pytest.raises(UsageError, match=r"address 'x' does not go with the executor 'local'"):
        make_executor("local", address="x")
    with pytest.raises(UsageError, match="must list different CUDA devices by number"):
        resolve_devices("cpu,cpu")
    with pytest.raises(UsageError, match="workers is a setting of the executor"):
        compress(tiny_llama, tmp_path / "out", RECIPE, executor=LocalExecutor(), workers=2)
    walked = Recipe(criterion="wanda", calibration={"source": "random-tokens"}, refiner="none")
    with pytest.raises(UsageError, match=r"workers 2 is for work without calibration.*leave it out"):
        compress(tiny_llama, tmp_path / "out", walked, workers=2)
    with one_thread():
        assert torch.get_num_threads() == 1


def test_ctrl_c_ends_the_workers_and_keeps_the_work(tiny_llama: Path, tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "mendlm", "compress", tiny_llama, tmp_path / "out", "--rank", "4", "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    run.stdout.readline()  # the first tensor is done
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    if run.returncode == 0:
        pytest.skip("it was done before the signal came")
    assert run.returncode == 130
    assert said.startswith("interrupted. Run the same command with --resume")
    assert has_partial(tmp_path / "out")
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
