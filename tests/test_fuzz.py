"""Fuzzing: whatever a file holds, its parser answers with a value or one sentence. 100,000 inputs in all."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

import fuzzing

COUNTS = {
    "header": 40_000,
    "index": 30_000,
    "packed": 8_000,
    "gguf": 20_000,
    "journal": 1_500,
    "recipe": 1_000,
    "grid": 600,
    "sweep": 3_000,
    "curves": 2_000,
    "evaluations": 2_000,
}


@pytest.mark.parametrize("name", COUNTS)
def test_any_input_is_parsed_or_refused(tmp_path: Path, name: str) -> None:
    n_refused = fuzzing.fuzz(fuzzing.targets(tmp_path)[name], COUNTS[name])
    assert name == "journal" or 0 < n_refused < COUNTS[name]  # some are sound, and most are not


def test_there_are_a_hundred_thousand_inputs() -> None:
    assert sum(COUNTS.values()) >= 100_000


def test_no_input_takes_much_memory() -> None:
    tracemalloc.start()
    try:
        for target in (fuzzing.header, fuzzing.index, fuzzing.gguf):
            fuzzing.fuzz(target, 500, seed=1)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
