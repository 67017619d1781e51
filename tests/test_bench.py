"""`bench`: what is in the rows, what is counted, what is refused. No times are asserted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mendlm
from mendlm import Recipe, speed
from mendlm._speed_worker import _bytes_by_storage
from mendlm.cli import main
from mendlm.errors import MendError, UsageError
from mendlm.runtime import RUNTIMES
from mendlm.speed import RowDone, RowStarted, SpeedRow
from tiny import tiny_model

SMALL: dict[str, Any] = {"prompt_tokens": 24, "new_tokens": 4, "repeats": 2, "threads": 1}


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "out"
    mendlm.compress(tiny_llama, out, Recipe(rank=4, n_iter=2))
    return out


def check_numbers(row: SpeedRow) -> None:
    assert row.unavailable is None
    assert row.prefill_tokens_per_second is not None
    assert row.decode_tokens_per_second is not None
    assert len(row.prefill_seconds) == len(row.decode_seconds) == SMALL["repeats"]
    assert min(row.prefill_seconds + row.decode_seconds) > 0
    assert row.prefill_tokens_per_second == pytest.approx(2 * 24 / (sum(row.prefill_seconds) / 2))
    assert row.decode_tokens_per_second == pytest.approx(2 * 4 / (sum(row.decode_seconds) / 2))
    assert row.load_seconds is not None
    assert row.load_seconds > 0
    assert row.peak_memory_bytes is not None
    assert row.weights_bytes is not None
    assert 0 < row.weights_bytes < row.peak_memory_bytes
    assert row.peak_device_bytes is None


def test_every_runtime_against_the_original(packed: Path, tiny_llama: Path) -> None:
    events: list[Any] = []
    result = mendlm.bench(packed, dense=tiny_llama, batch_size=2, progress=events.append, **SMALL)
    assert [row.name for row in result.rows] == ["dense", *RUNTIMES]
    assert result.baseline == "dense"
    ran = {row.name: row for row in result.rows if row.unavailable is None}
    assert {"dense", "merged", "factored", "packed"} <= set(ran)
    for row in ran.values():
        check_numbers(row)
    dense = ran["dense"]
    assert (dense.prefill_ratio, dense.decode_ratio, dense.runtime) == (1.0, 1.0, None)
    for row in ran.values():
        assert row.prefill_ratio == row.prefill_tokens_per_second / dense.prefill_tokens_per_second  # type: ignore[operator]
        assert row.decode_ratio == row.decode_tokens_per_second / dense.decode_tokens_per_second  # type: ignore[operator]
        folder = tiny_llama if row is dense else packed
        assert row.folder == str(folder)
        assert row.file_bytes == (folder / "model.safetensors").stat().st_size
    weights = {name: row.weights_bytes for name, row in ran.items()}
    assert weights["merged"] == weights["dense"]
    assert weights["packed"] < weights["dense"] < weights["factored"]  # type: ignore[operator]
    assert result.settings == {**SMALL, "batch_size": 2, "dtype": "float32", "device": "cpu"}
    assert set(result.machine) == {"device_name", "torch", "transformers", "python"}
    assert [type(event) for event in events] == [RowStarted, RowDone] * len(result.rows)


def test_loading_is_timed_with_everything_imported(packed: Path) -> None:
    """Importing transformers takes a hundred times as long as opening a tiny model."""
    job = {"folder": str(packed), "runtime": "packed", "dtype": "float32", "device": "cpu", "batch_size": 1, **SMALL}
    program = (
        "import sys, mendlm._speed_worker as worker\n"
        "load = worker.open_model\n"
        "def watched(*args, **options):\n"
        "    before = set(sys.modules)\n"
        "    model = load(*args, **options)\n"
        "    print([name for name in sys.modules.keys() - before if name.startswith('transformers.')])\n"
        "    return model\n"
        "worker.open_model = watched\n"
        f"worker.measure({job!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def answers(monkeypatch: pytest.MonkeyPatch, **errors: dict[str, str]) -> None:
    """No processes: every row takes a second, but those in `errors`."""

    def measure(job: dict[str, Any]) -> dict[str, Any]:
        name = job["runtime"] or "dense"
        if name in errors:
            return {"error": errors[name]}
        facts = {"dtype": "float32", "threads": 1, "device_name": "x", "torch": "2", "transformers": "5", "python": "3"}
        times = {"prefill_seconds": [1.0, 3.0], "decode_seconds": [1.0, 1.0], "load_seconds": 1.0}
        sizes = {"weights_bytes": 10, "peak_memory_bytes": 20, "peak_device_bytes": None, "file_bytes": 5}
        return {**times, **sizes, "facts": facts}

    monkeypatch.setattr(speed, "_measure", measure)


def test_merged_stands_for_the_original(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    result = mendlm.bench(packed, runtimes=["packed", "packed"])
    assert [row.name for row in result.rows] == ["merged", "packed"]
    assert result.baseline == "merged"
    assert result.rows[1].prefill_tokens_per_second == 512 / 2.0
    assert result.rows[1].prefill_ratio == 1.0


def test_what_cannot_run_is_listed_with_its_reason(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(
        monkeypatch, packed={"type": "UsageError", "message": "it needs X."}, factored={"type": "E", "message": "y"}
    )
    rows = {row.name: row for row in mendlm.bench(packed).rows}
    assert rows["packed"].unavailable == "it needs X."
    assert rows["factored"].unavailable == "E: y"
    assert rows["packed"].decode_tokens_per_second is rows["packed"].decode_ratio is None
    assert rows["merged"].decode_ratio == 1.0


def test_a_baseline_that_does_not_fit_leaves_the_rest(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, merged={"type": "OutOfMemoryError", "message": "too big"})
    rows = {row.name: row for row in mendlm.bench(packed).rows}
    assert rows["packed"].decode_tokens_per_second is not None
    assert rows["packed"].decode_ratio is None


def test_nothing_measured_is_an_error(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, **{name: {"type": "MendError", "message": "no"} for name in RUNTIMES})
    with pytest.raises(MendError, match="nothing could be measured: merged: no; factored: no"):
        mendlm.bench(packed)


def test_a_process_that_dies_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_PROGRAM", "import os; os.kill(os.getpid(), 9)")
    assert "ended by SIGKILL. Probably out of memory." in speed._measure({})["error"]["message"]
    monkeypatch.setattr(speed, "_PROGRAM", "raise SystemExit('no such thing')")
    assert "failed with exit code 1: no such thing" in speed._measure({})["error"]["message"]


def test_tied_weights_count_once() -> None:
    model = tiny_model("LlamaForCausalLM", tie_word_embeddings=True)
    buffers = sum(buffer.nbytes for buffer in {b.data_ptr(): b for b in model.buffers()}.values())
    assert sum(_bytes_by_storage(model).values()) == sum(p.nbytes for p in model.parameters()) + buffers
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"runtimes": ["packd"]}, "Did you mean 'packed'"),
        ({"runtimes": []}, "runtimes is empty"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, got 0"),
        ({"prompt_tokens": 2.5}, r"prompt_tokens must be a whole number, got 2\.5"),
        ({"repeats": "3"}, "repeats must be a whole number, got '3'"),
        ({"runtimes": "packed"}, r"runtimes must be a list of names, got 'packed'\. Give \['packed'\]"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": 100_000}, r"threads must be at most \d+, the cores of this machine, got 100000"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"dense": "nowhere"}, "'nowhere' is no folder"),
    ],
)
def test_wrong_use(packed: Path, how: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        mendlm.bench(packed, **how)


def test_folders_in_the_wrong_place(packed: Path, tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match=r"is compressed by mendlm\. Give the original"):
        mendlm.bench(packed, dense=packed)
    with pytest.raises(UsageError, match="is not compressed by mendlm, so it has neither runtimes nor an original"):
        mendlm.bench(tiny_llama, runtimes=["packed"])


# the command line


def test_json_of_a_dense_model(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1", "--threads", "1", "--dtype", "bfloat16"]
    assert main(["bench", str(tiny_llama), *how, "--json"]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert set(document) == {"model", "baseline", "rows", "settings", "machine"}
    assert document["settings"]["dtype"] == "bfloat16"
    (row,) = document["rows"]
    assert set(row) == set(SpeedRow.__dataclass_fields__)
    assert (row["name"], row["decode_ratio"], len(row["decode_seconds"])) == ("dense", 1.0, 1)
    assert shown.err == "[1/1] dense measured\n"


def test_more_tokens_than_positions(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--runtimes", "merged", "--prompt-tokens", "250", "--new-tokens", "7", "--json"]
    assert main(["bench", str(packed), *how]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "error: 250 prompt tokens and 7 new ones are more than the 256 positions of the model." in shown.err


def test_one_table(packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers(monkeypatch, packed={"type": "UsageError", "message": "it needs \x1b."})
    assert main(["bench", str(packed), "--runtimes", "factored, packed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("runtime"))
    assert "512 prompt tokens, 64 new ones, batch 1; float32 on x, 1 thread; medians of 3" in lines[start - 1]
    assert re.fullmatch(r"merged +256 +1\.00 +64\.0 +1\.00 +10 B +20 B +1\.0 s +5 B", lines[start + 1])
    assert lines[start + 2].startswith("factored")
    assert lines[start + 3] == "packed"
    assert lines[start + 4].startswith("merged stands for the dense model")
    assert lines[start + 5] == "packed cannot run here: it needs \\x1b."


def test_an_unknown_runtime_is_wrong_use(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(packed), "--runtimes", "merged,packd"]) == 2
    assert capsys.readouterr().err == (
        f"error: unknown runtime 'packd'. Did you mean 'packed'? Available: {', '.join(sorted(RUNTIMES))}.\n"
    )
