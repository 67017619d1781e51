"""Cells of the quality tables: `mendlm compress` and `mendlm eval` as a user could type them, done once and kept."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _common import ROOT, environment, smollm2, wikitext

Key = tuple[str, ...]
EVALUATION = ["--n-windows", "8"]  # of 2048 tokens


def calibration_text() -> Path:
    """The tokenised WikiText-2 validation split with `<unk>` read as "the", as one text."""
    target = ROOT / "work" / "calibration.txt"
    if not target.exists():
        source = ROOT.parent / "shared" / "data" / "wikitext-2-v1" / "valid.txt.gz"
        if not source.exists():
            sys.exit(f"the calibration text {source.name} is not at hand; figures of other texts do not compare")
        target.parent.mkdir(exist_ok=True)
        target.write_text(gzip.open(source, "rt", encoding="utf-8").read().replace("<unk>", "the"), encoding="utf-8")
    return target


def shown(flags: list[str]) -> list[str]:
    """Flags without the folders of this machine."""
    return [flag.rpartition("/")[2] for flag in flags]


def run(*arguments: str, n_threads: int | None = None) -> tuple[dict[str, Any], float]:
    """JSON output and wall seconds of one `mendlm` process."""
    environment = os.environ if n_threads is None else os.environ | {"OMP_NUM_THREADS": str(n_threads)}
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "mendlm", *arguments, "--json"], capture_output=True, text=True, env=dict(environment)
    )
    if process.returncode:
        raise RuntimeError(f"mendlm {' '.join(arguments)} failed: {process.stderr[-2000:]}")
    return json.loads(process.stdout), time.perf_counter() - start


def measure(name: str, flags: list[str] | None, n_threads: int | None = None) -> dict[str, Any]:
    """Figures of one cell; the dense model for flags None. `name` is the folder it may use meanwhile."""
    model, evaluation = smollm2(), ["--text", str(wikitext()), *EVALUATION]
    if flags is None:
        return {"flags": [], "ppl": run("eval", str(model), *evaluation, n_threads=n_threads)[0]["ppl"]}
    out = ROOT / "work" / name
    result, seconds = run("compress", str(model), str(out), *flags, "--overwrite", n_threads=n_threads)
    peak = json.loads((out / "mendlm.run.json").read_text())["peak_memory_bytes"]
    ppl = run("eval", str(out), *evaluation, n_threads=n_threads)[0]["ppl"]
    facts = {"seconds": round(seconds, 1), "peak_mb": round(peak / 1e6), "ratio": result["totals"]["ratio"]}
    return {"flags": shown(flags), "ppl": ppl} | facts


class Cells:
    """Cells that are done, in a results file that a fresh clone goes on from and in a journal of this machine.

    Parameters
    ----------
    name : of both files.
    fields : names of the parts of a key.
    flags_of : key -> flags; a cell whose flags have changed since counts as not measured.
    """

    def __init__(self, name: str, fields: tuple[str, ...], flags_of: Callable[[Key], list[str] | None]) -> None:
        self._name, self._fields, self._flags_of = name, fields, flags_of
        self.results = ROOT / "benchmarks" / "results" / f"{name}-cpu.json"
        self._journal = ROOT / "work" / f"{name}.jsonl"
        self._lock = threading.Lock()
        self.done: dict[Key, dict[str, Any]] = {}
        rows = json.loads(self.results.read_text())["rows"] if self.results.exists() else []
        rows += [json.loads(line) for line in self._journal.read_text().splitlines()] if self._journal.exists() else []
        for row in rows:
            key = tuple(row[field] for field in fields)
            if row["flags"] == shown(flags_of(key) or []):
                self.done[key] = row

    def go_on(self, wanted: list[Key], minutes: float, n_jobs: int = 1) -> None:
        """Measure what is missing, in this order; start no new cell after `minutes`.

        `n_jobs` cells run at a time, each on one thread if there is more than one.
        """
        missing = [key for key in wanted if key not in self.done]
        self._journal.parent.mkdir(exist_ok=True)
        smollm2()
        end = time.monotonic() + 60 * minutes
        n_threads = 1 if n_jobs > 1 else None
        idle = [f"{self._name}-cell-{i}" for i in range(n_jobs)]

        def work(key: Key) -> None:
            if time.monotonic() > end:
                return
            with self._lock:
                folder = idle.pop()
            try:
                figures = measure(folder, self._flags_of(key), n_threads)
            except RuntimeError as err:
                print(key, err, flush=True)
                return
            finally:
                with self._lock:
                    idle.append(folder)
            self._keep(key, figures)

        with ThreadPoolExecutor(n_jobs) as pool:
            list(pool.map(work, missing))
        if left := sum(key not in self.done for key in wanted):
            print(f"{left} cells are left; run again to go on")

    def _keep(self, key: Key, figures: dict[str, Any]) -> None:
        row = dict(zip(self._fields, key, strict=True)) | figures
        with self._lock:
            with self._journal.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.done[key] = row
            print(*key, {k: v for k, v in figures.items() if k != "flags"}, flush=True)

    def write(self, protocol: str) -> None:
        """The results file."""
        document = {
            "benchmark": self._name,
            "environment": environment("cpu"),
            "protocol": protocol,
            "rows": list(self.done.values()),
        }
        self.results.write_text(json.dumps(document, indent=1) + "\n")

    def from_command_line(self, description: str, cells: list[Key], choices: list[list[str]], n_jobs: int) -> bool:
        """Measure the `cells` that the command line asks for, and write the results; False if it only lists them.

        `choices` are the values of each field of a key, in the order of the fields; ("dense", "", "") always counts.
        `n_jobs` is the default of ``--jobs``.
        """
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        flags = [field[:-1] + "ies" if field.endswith("y") else f"{field}s" for field in self._fields]
        for flag, values in zip(flags, choices, strict=True):
            parser.add_argument(f"--{flag}", nargs="+", choices=values, default=values)
        parser.add_argument("--minutes", type=float, default=55.0, help="start no new cell after this")
        parser.add_argument("--jobs", type=int, default=n_jobs, help="cells at a time, on one thread each if several")
        parser.add_argument("--list", action="store_true", help="show what is done and what is not, and stop")
        options = vars(parser.parse_args())
        chosen = [options[flag] for flag in flags]
        wanted = [
            c for c in cells if c[0] == "dense" or all(part in some for part, some in zip(c, chosen, strict=True))
        ]
        if options["list"]:
            missing = [key for key in wanted if key not in self.done]
            print(f"{len(self.done)} cells done, {len(missing)} missing: {missing}")
            return False
        self.go_on(wanted, options["minutes"], options["jobs"])
        self.write(description.split("Protocol: ")[1])
        return True


def replace_block(page: Path, marker: str, text: str) -> None:
    """Put `text` between ``<!-- marker -->`` and ``<!-- end -->`` of a page that has them."""
    before, found, tail = page.read_text(encoding="utf-8").partition(f"<!-- {marker} -->\n")
    if found:
        page.write_text(f"{before}{found}{text}\n{tail[tail.index('<!-- end -->') :]}", encoding="utf-8")


def table(lines: list[list[str]]) -> str:
    """Markdown; the first line is the head."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest])
