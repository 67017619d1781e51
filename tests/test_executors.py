"""Executors: the same bytes from any number of workers, and what happens when a worker dies or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mendlm import TLR, Recipe
from mendlm.checkpoints.staging import has_partial
from mendlm.devices import resolve_devices
from mendlm.errors import UsageError, WorkerError
from mendlm.execution import EXECUTORS, LocalExecutor, make_executor
from mendlm.execution.tasks import one_thread
from mendlm.pipeline import Event, TensorDone, TensorStarted, compress

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
