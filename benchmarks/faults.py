"""The large campaign of faults: real runs killed, interrupted and starved, and parsers fed with mutated files.

    python benchmarks/faults.py [--kills 500] [--inputs 1000000]

The suites tests/test_faults.py and tests/test_fuzz.py are the same in small; every run must be resumable to the same
bytes, and every input must be parsed or refused in one sentence. Results go to results/faults-cpu.json.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from _common import ROOT, report

sys.path.insert(0, str(ROOT / "tests"))

import fuzzing
from faulting import Faults, Place, journaled, lose_power, resumes
from mendlm.checkpoints.staging import partial_folder
from tiny import byte_tokenizer, tiny_model

WAYS = ("before", "half", "after", "at a random time", "power", "ENOSPC", "EIO", "SIGINT")
# Of the inputs: what a parser costs sets its share.
SHARES = {"header": 0.4, "index": 0.3, "gguf": 0.2, "packed": 0.08, "journal": 0.015, "recipe": 0.005}


def stopped_runs(n: int, folder: Path) -> list[dict[str, Any]]:
    """`n` runs stopped in every way by turns; a row for each way."""
    model = folder / "model"
    tiny_model("LlamaForCausalLM").save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    rng = random.Random(0)
    rows = {way: {"fault": way, "n": 0, "same bytes": 0, "tensors kept": 0, "seconds": 0.0} for way in WAYS}
    with Faults() as faults:
        place = Place(faults, model, folder)
        run = partial(faults.run, *place.command, scratch=place.scratch)
        for i in range(n):
            way, started = WAYS[i % len(WAYS)], time.monotonic()
            if way == "at a random time":
                run(after=rng.uniform(0, place.seconds))
            else:
                ended = run(at=rng.randint(1, place.n_calls), how=way)
                if "Traceback" in ended.err or "bug in mendlm" in ended.err:
                    sys.exit(f"{way}: {ended.err}")
            if way == "power" and (place.scratch / "unsynced.json").exists():
                lose_power(place.scratch, rng)
            row: dict[str, Any] = rows[way]
            row["tensors kept"] += journaled(partial_folder(place.out))
            resumes(faults, place)  # raises if the bytes differ
            row["n"] += 1
            row["same bytes"] += 1
            row["seconds"] += time.monotonic() - started
    return list(rows.values())


def mutated_files(n: int, folder: Path) -> list[dict[str, Any]]:
    """`n` inputs; a row for each parser."""
    targets = fuzzing.targets(folder)
    rows = []
    for name, share in SHARES.items():
        count, started = round(share * n), time.monotonic()
        refused = fuzzing.fuzz(targets[name], count, seed=2)  # raises at anything but a sentence
        rows.append({"parser": name, "n": count, "refused": refused, "seconds": time.monotonic() - started})
        print(f"{name}: {count} inputs, {refused} refused", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="runs to stop")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="files to mutate")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = stopped_runs(options.kills, Path(folder))
        notes = f"runs stopped: {sum(row['n'] for row in rows)}, all resumed to the same bytes. "
        parsed = mutated_files(options.inputs, Path(folder))
    notes += f"mutated files: {sum(row['n'] for row in parsed)}, all parsed or refused in one sentence: "
    notes += ", ".join(f"{row['parser']} {row['n']} ({row['refused']} refused)" for row in parsed)
    report("faults", "cpu", rows, notes)


if __name__ == "__main__":
    main()
