"""The Ray executor, on a real cluster of two nodes with one CPU each: the same bytes as local, whatever is lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from safetensors.torch import load_file, save_file

from mendlm import TLR, Recipe
from mendlm.checkpoints.staging import has_partial
from mendlm.errors import NonFiniteError, UsageError, WorkerError
from mendlm.execution import RayExecutor
from mendlm.pipeline import Event, TensorDone, compress

pytestmark = pytest.mark.slow

ray = pytest.importorskip("ray")

RECIPE = Recipe(refiner=TLR(rank=4, n_iter=300))  # a tensor takes a good part of a second
ONE = Recipe(refiner=TLR(rank=4, n_iter=2), include=["model.layers.1.mlp.up_proj.weight"])
(NAME,) = ONE.include
WEIGHTS = "model.safetensors"
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        cluster.add_node(**NODE)
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def connected(cluster: Any) -> Iterator[Any]:
    """The cluster, with this process connected to it: processes of its machines then serve many runs."""
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    assert ray.is_initialized()  # no run has ended a connection that it did not make
    ray.shutdown()


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("reference") / "out"
    compress(tiny_llama, out, RECIPE, workers=1)
    return (out / WEIGHTS).read_bytes()


T = TypeVar("T")


def soon(value: Callable[[], T]) -> T:
    """`value()` once it is true, or what it is after 30 s: processes start and end when the system finds the time."""
    deadline = time.monotonic() + 30
    while not (found := value()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def working(node: Any) -> list[int]:
    """Processes of a node that are at a tensor: Ray gives them the name of the task."""
    found = []
    for process in node.all_processes["raylet"]:
        pid = process.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if b"ray::mendlm" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def test_a_stopped_local_run_goes_on_on_a_cluster_with_the_same_bytes(
    cluster: Any, tiny_llama: Path, reference: bytes, tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, TensorDone) and event.index == 2:
            raise KeyboardInterrupt

    out, events = tmp_path / "out", list[Event]()
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_llama, out, RECIPE, workers=1, on_event=stop)
    settings = {"executor": "ray", "ray_address": cluster.address, "resume": True}
    assert compress(tiny_llama, out, RECIPE, on_event=events.append, **settings).resumed == 2
    assert [event.index for event in events if isinstance(event, TensorDone)] == list(range(3, 15))
    assert (out / WEIGHTS).read_bytes() == reference
    assert not ray.is_initialized()
    assert len(cluster.list_all_nodes()) == 2


def test_a_weight_at_fault_ends_the_run(connected: Any, tiny_llama: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    tensors = load_file(tiny_llama / WEIGHTS)
    tensors[NAME][3, 5] = float("nan")
    save_file(tensors, bad / WEIGHTS)
    with pytest.raises(NonFiniteError, match=rf"NaN.* \[{NAME} in {WEIGHTS}"):
        compress(bad, tmp_path / "out", ONE, executor="ray")
    assert not has_partial(tmp_path / "out")


def test_a_process_that_takes_too_long_is_ended_and_the_tensor_named(
    connected: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(WorkerError, match=rf"timeout of 0.001 s. That was try 3 of 3. .*--resume. \[{NAME}"):
        compress(tiny_llama, tmp_path / "out", ONE, executor=RayExecutor(task_timeout=1e-3))


def test_ctrl_c_ends_the_tasks_and_keeps_the_work(connected: Any, tiny_llama: Path, tmp_path: Path) -> None:
    (node,) = connected.worker_nodes

    def stop(event: Event) -> None:
        if isinstance(event, TensorDone) and soon(lambda: working(node)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tiny_llama, tmp_path / "out", RECIPE, executor="ray", on_event=stop)
    assert has_partial(tmp_path / "out")
    assert soon(lambda: not working(node))


def test_a_lost_node_costs_nothing(
    connected: Any, tiny_llama: Path, reference: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost: list[int] = []

    def lose(event: Event) -> None:
        if isinstance(event, TensorDone) and not lost:
            (node,) = connected.worker_nodes
            lost.extend(soon(lambda: working(node)))
            if lost:
                connected.remove_node(node, allow_graceful=False)

    with caplog.at_level(logging.WARNING, "mendlm"):
        compress(tiny_llama, tmp_path / "out", RECIPE, executor="ray", on_event=lose)
    assert len(lost) == 1
    assert "try 1 of 3 failed" in caplog.text
    assert soon(lambda: not Path(f"/proc/{lost[0]}").exists())
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == reference


def test_wrong_settings(tiny_llama: Path, tmp_path: Path) -> None:
    for address in ("ray://host:10001", "nowhere", ""):
        with pytest.raises(UsageError, match=r"ray_address must be 'auto', 'local' or 'HOST:PORT', got"):
            RayExecutor(address)
    with pytest.raises(UsageError, match=r"nothing answers at the Ray address '127.0.0.1:1'.*ray start --head"):
        RayExecutor("127.0.0.1:1").devices("cpu")
    with pytest.raises(UsageError, match=r"device 'cuda:0' does not go with the executor 'ray'"):
        RayExecutor().devices("cuda:0")
    walked = Recipe(criterion="wanda", calibration={"source": "random-tokens"}, refiner="none")
    with pytest.raises(UsageError, match=r"executor 'ray' is for work without calibration"):
        compress(tiny_llama, tmp_path / "out", walked, executor="ray")
