"""Faults: runs that are killed, interrupted, or denied the disk lose nothing, and damaged input is one sentence.

Real `mendlm compress` processes; see `faulting` for how they are stopped.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from faulting import Ended, Faults, Place, bytes_of, failing_reads, journaled, lose_power, resumes, spread
from mendlm import Recipe
from mendlm.checkpoints.staging import partial_folder
from mendlm.cli import main
from mendlm.errors import CheckpointError, MendError
from mendlm.inspection import inspect
from mendlm.pipeline import compress, plan

N_POINTS, N_TIMES = 40, 10  # kills at chosen calls, and at random times


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    with Faults() as server:
        yield server


@pytest.fixture(scope="module")
def place(faults: Faults, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(faults, tiny_llama, tmp_path_factory.mktemp("faults"))


def clean(ended: Ended) -> None:
    assert "Traceback" not in ended.err
    assert "bug in mendlm" not in ended.err


def test_killed_at_any_call(faults: Faults, place: Place) -> None:
    ways = ("before", "half", "after")
    n_kept = 0
    for i, at in enumerate(spread(N_POINTS, place.n_calls)):
        ended = faults.run(*place.command, scratch=place.scratch, at=at, how=ways[i % 3])
        assert ended.code == -9, at
        n_done = journaled(partial_folder(place.out))
        again = resumes(faults, place)
        resumed = json.loads(again.out)["resumed"]
        assert resumed >= n_done, at  # a finished OUT counts all
        n_kept += resumed
    assert n_kept > N_POINTS


def test_killed_at_random_times(faults: Faults, place: Place) -> None:
    rng = random.Random(0)
    for _ in range(N_TIMES):
        faults.run(*place.command, scratch=place.scratch, after=rng.uniform(0, place.seconds))
        resumes(faults, place)


def test_killed_again_and_again(faults: Faults, place: Place) -> None:
    command = list(place.command)
    for _ in range(12):
        if faults.run(*command, scratch=place.scratch, at=place.n_calls // 4, how="half").code == 0:
            break
        command = [*place.command, "--resume"]
    assert bytes_of(place.out) == place.reference
    shutil.rmtree(place.out)


def test_killed_while_it_replaces(faults: Faults, place: Place) -> None:
    other = [*place.command[:3], "--sparsity", "0.5", "--rank", "1", "--n-iter", "1"]
    assert faults.run(*other, scratch=place.scratch).code == 0
    old = bytes_of(place.out)
    command = [*place.command, "--overwrite"]
    aside = place.out.parent / ".out.mendlm-old"
    for at in range(place.n_calls - 16, place.n_calls + 12, 6):
        ended = faults.run(*command, scratch=place.scratch, at=at, how="before")
        assert ended.code in (-9, 0)
        kept = next((folder for folder in (place.out, aside) if folder.exists()), None)
        assert kept is not None
        if aside.exists() or ended.code == -9:
            complete = [bytes_of(folder) for folder in (place.out, aside) if folder.exists()]
            assert old in complete or place.reference in complete
        again = faults.run(*place.command, "--resume", scratch=place.scratch)
        assert again.code == 0, again.err
        assert bytes_of(place.out) == place.reference
        shutil.rmtree(place.out)
        shutil.rmtree(aside, ignore_errors=True)
        assert faults.run(*other, scratch=place.scratch).code == 0
    shutil.rmtree(place.out)


def test_power_lost(faults: Faults, place: Place) -> None:
    rng, n_lost = random.Random(0), 0
    for at in spread(6, place.n_calls - 20):
        assert faults.run(*place.command, scratch=place.scratch, at=at, how="power").code == -9
        n_lost += lose_power(place.scratch, rng)
        resumes(faults, place)
    assert n_lost > 6


def test_disk_full_at_any_call(faults: Faults, place: Place) -> None:
    for at in spread(7, place.n_calls - 20):
        ended = faults.run(*place.command, scratch=place.scratch, at=at, how="ENOSPC")
        clean(ended)
        assert ended.code == 1, at
        assert "no space left" in ended.err or "cannot write" in ended.err
        assert not place.out.exists()
        resumes(faults, place)


def test_one_failing_call(faults: Faults, place: Place) -> None:
    for at in spread(7, place.n_calls):
        ended = faults.run(*place.command, scratch=place.scratch, at=at, how="EIO")
        clean(ended)
        assert ended.code in (0, 1)  # 0: what it could not remove when it was done does not matter
        resumes(faults, place)


def test_interrupted_twice(faults: Faults, place: Place) -> None:
    for at in spread(5, place.n_calls - 12):
        ended = faults.run(*place.command, scratch=place.scratch, at=at, how="SIGINT")
        clean(ended)
        assert ended.code == 130, at
        assert "interrupted." in ended.err
        resumes(faults, place)


@pytest.mark.parametrize(("suffix", "n_good"), [
    ("model.safetensors", 0), ("model.safetensors", 4), ("model.safetensors", 15), ("tokenizer.json", 0),
    ("config.json", 0),
])  # fmt: skip
def test_input_that_cannot_be_read(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, n_good: int
) -> None:
    recipe = Recipe(refiner="none")
    with (
        failing_reads(monkeypatch, suffix, n_good),
        pytest.raises(CheckpointError, match=rf"cannot read '.*{suffix}': Input/output error"),
    ):
        compress(tiny_llama, tmp_path / "out", recipe)
    assert list(tmp_path.iterdir()) == []


def test_damaged_models_are_refused_in_one_sentence(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    path = model / "model.safetensors"
    whole = path.read_bytes()
    rng, n_refused = random.Random(0), 0
    sentences: list[str] = []
    n_header = 8 + int.from_bytes(whole[:8], "little")
    places = [(rng.randrange(n_header), 1 << rng.randrange(8)) for _ in range(60)]
    for place, bit in places:
        damaged = bytearray(whole)
        damaged[place] ^= bit
        path.write_bytes(damaged)
        for use in (inspect, plan):
            try:
                use(model)
            except MendError as err:
                n_refused += 1
                sentences.append(str(err))
    assert n_refused > len(places)
    assert not any("\n" in sentence for sentence in sentences)
    for damaged in (whole[:-1], whole[:n_header], whole[:7], b""):
        path.write_bytes(damaged)
        for argv in (["compress", str(model), str(tmp_path / "out")], ["inspect", str(model)]):
            assert main(argv) == 1
            assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
