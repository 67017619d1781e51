"""Cells of the quality tables: points of a sweep, said as flags of `mendlm compress`, done once and kept."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from _common import ROOT, environment, smollm2, wikitext
from mendlm.budgets import stored_frac
from mendlm.cli._app import build_command
from mendlm.cli._errors import Session
from mendlm.cli.compress import recipe_of
from mendlm.config import Recipe
from mendlm.sweeping.runner import EvaluationSettings, Job, remove_work, run_jobs

Key = tuple[str, ...]
N_WINDOWS = 8  # of 2048 tokens


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


def recipe(flags: list[str]) -> Recipe:
    """The recipe that `mendlm compress` would follow with these flags."""
    compress = build_command().commands["compress"]
    return recipe_of(compress.make_context("compress", ["MODEL", "OUT", *flags], obj=Session()).params)


def run(*arguments: str) -> tuple[dict[str, Any], float]:
    """JSON output and wall seconds of one `mendlm` process."""
    start = time.perf_counter()
    process = subprocess.run([sys.executable, "-m", "mendlm", *arguments, "--json"], capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"mendlm {' '.join(arguments)} failed: {process.stderr[-2000:]}")
    return json.loads(process.stdout), time.perf_counter() - start


class Cells:
    """Cells that are done, in results files that a fresh clone goes on from and in a journal of this machine.

    A cell that was measured on one device counts as done; there is a results file for each kind of device.

    Parameters
    ----------
    name : of both files.
    fields : names of the parts of a key.
    flags_of : key -> flags; a cell whose flags have changed since counts as not measured. KeyError: there is no such
        cell any more.
    """

    def __init__(self, name: str, fields: tuple[str, ...], flags_of: Callable[[Key], list[str] | None]) -> None:
        self._name, self._fields, self._flags_of = name, fields, flags_of
        self._journal = ROOT / "work" / f"{name}.jsonl"
        self.done: dict[Key, dict[str, Any]] = {}
        files = [self._results(kind) for kind in ("cuda", "cpu")]
        rows = [row for path in files if path.exists() for row in json.loads(path.read_text())["rows"]]
        rows += [json.loads(line) for line in self._journal.read_text().splitlines()] if self._journal.exists() else []
        for row in rows:
            key = tuple(row[field] for field in fields)
            with contextlib.suppress(KeyError):
                if row["flags"] == shown(flags_of(key) or []):
                    self.done[key] = row

    def _results(self, device: str) -> Path:
        return ROOT / "benchmarks" / "results" / f"{self._name}-{device.partition(':')[0]}.json"

    def go_on(self, wanted: list[Key], minutes: float, n_jobs: int = 1, device: str = "cpu") -> None:
        """Measure what is missing, in this order, on a device; start no new cell after `minutes`.

        `n_jobs` cells run at a time, each on one thread if there is more than one. A cell that is stopped goes on from
        its tensors done so far.
        """
        missing = [key for key in wanted if key not in self.done] if minutes > 0 else []
        if missing:
            self._journal.parent.mkdir(exist_ok=True)
            smollm2()
            if n_jobs > 1:
                os.environ.setdefault("OMP_NUM_THREADS", "1")
            jobs = (replace(self._job(key), device=device) for key in missing)
            run_jobs(jobs, self, workers=n_jobs, minutes=minutes)
        if left := sum(key not in self.done for key in wanted):
            print(f"{left} cells are left; run again to go on")

    def _job(self, key: Key) -> Job:
        """What has to be run for a cell; the dense model for flags None."""
        name, flags = json.dumps(key), self._flags_of(key)
        evaluation = EvaluationSettings(text=str(wikitext()), n_windows=N_WINDOWS)
        if flags is None:
            return Job(name, str(smollm2()), evaluation)
        # By name and flags: a cell whose flags have changed does not go on with the work of the old ones.
        digest = hashlib.sha256(json.dumps([key, flags]).encode()).hexdigest()[:12]
        out = ROOT / "work" / f"{self._name}-{digest}"
        return Job(name, str(smollm2()), evaluation, recipe(flags).to_dict(), str(out))

    def started(self, job: Job) -> None:
        """Nothing: a cell that is done says so."""

    def noted(self, job: Job, what: str) -> None:
        """Nothing."""

    def failed(self, job: Job, error: str) -> None:
        """Say so; the cell is tried again by the next run."""
        print(tuple(json.loads(job.name)), error, flush=True)

    def measured(self, job: Job, figures: dict[str, Any]) -> None:
        """Keep the figures of a cell."""
        key = tuple(json.loads(job.name))
        row: dict[str, Any] = {"flags": shown(self._flags_of(key) or []), "ppl": figures["ppl"]}
        if job.out is not None:
            row |= {
                "seconds": round(figures["seconds"], 1),
                "peak_mb": round(figures["peak_memory_bytes"] / 1e6),
                "ratio": stored_frac(figures["stored_bytes"], figures["dense_bytes"]),
            }
            if job.device != "cpu":
                row["peak_device_mb"] = round(figures["peak_device_bytes"] / 1e6)
            remove_work(Path(job.out))
        if job.device != "cpu":
            row["device"] = torch.cuda.get_device_name(job.device)
        row = dict(zip(self._fields, key, strict=True)) | row
        with self._journal.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.done[key] = row
        print(*key, {k: v for k, v in row.items() if k not in ("flags", *self._fields)}, flush=True)

    def write(self, protocol: str, device: str = "cpu") -> None:
        """The results file of the cells measured on a device."""
        document = {
            "benchmark": self._name,
            "environment": environment(device),
            "protocol": protocol,
            "rows": [row for row in self.done.values() if ("device" in row) == (device != "cpu")],
        }
        self._results(device).write_text(json.dumps(document, indent=1) + "\n")

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
        parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
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
        try:
            self.go_on(wanted, options["minutes"], options["jobs"], options["device"])
        finally:
            self.write(description.split("Protocol: ")[1], options["device"])
        return True


def replace_block(page: Path, marker: str, text: str) -> None:
    """Put `text` between ``<!-- marker -->`` and ``<!-- end -->`` of a page that has them."""
    before, found, tail = page.read_text(encoding="utf-8").partition(f"<!-- {marker} -->\n")
    if found:
        page.write_text(f"{before}{found}{text}\n{tail[tail.index('<!-- end -->') :]}", encoding="utf-8")


def publish(name: str, page: Path, protocol: str, rows: list[dict[str, Any]], text: str) -> None:
    """Print a table, put it into its block of a page, and keep the rows under results/."""
    print(f"\n{text}")
    replace_block(page, name, text)
    document = {"benchmark": name, "environment": environment("cpu"), "protocol": protocol, "rows": rows}
    (ROOT / "benchmarks" / "results" / f"{name}-cpu.json").write_text(json.dumps(document, indent=1) + "\n")


def table(lines: list[list[str]]) -> str:
    """Markdown; the first line is the head."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest])


def spearman_of(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's correlation: that of the ranks."""
    ranks = []
    for values in (a, b):
        places = {index: place for place, index in enumerate(sorted(range(len(values)), key=values.__getitem__))}
        ranks.append([float(places[index]) for index in range(len(values))])
    return statistics.correlation(*ranks)
