"""Benchmark tasks on SmolLM2, dense and mended, in one command; and the harness's own command on the dense export.

    python benchmarks/tasks.py [--limit 100] [--gsm8k-limit N] [--batch-size 8] [--harness-limit N]

Writes results/tasks-cpu.json and the table of docs/tasks.md. Answers are kept under work/, so a run that is stopped
goes on; the harness's own command keeps its own. --harness-limit 0 leaves that command out. GSM8K, whose answers are
written token by token, takes most of the time: --gsm8k-limit asks for fewer of its documents, in a command of its own.

The mended model: preset balanced at 50 % and rank 16, on 16 sequences of 1024 tokens of the calibration text, float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from _cells import calibration_text, replace_block, run, shown, table
from _common import ROOT, report, smollm2

TASKS = ["arc_challenge_local", "gsm8k_local", "truthfulqa_mc1_local", "truthfulqa_mc2_local", "mmlu_local_flat"]
NAMES = ["ARC-Challenge", "GSM8K", "TruthfulQA mc1", "TruthfulQA mc2", "MMLU"]
MENDED = ["--preset", "balanced", "--rank", "16", "--n-sequences", "16", "--seqlen", "1024", "--dtype", "float32"]
WORK = ROOT / "work" / "tasks"
CACHE = ROOT / "work" / "tasks-cache"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100, help="documents a task")
    parser.add_argument("--gsm8k-limit", type=int, help="documents of GSM8K, if not as many")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--harness-limit", type=int, help="documents a task for the harness's own command")
    args = parser.parse_args()
    harness_limit = args.limit if args.harness_limit is None else args.harness_limit
    dense, mended, export = smollm2(), WORK / "mended", WORK / "export"
    if not (mended / "mendlm.json").exists():
        run("compress", str(dense), str(mended), *MENDED, "--calibration", str(calibration_text()))
    if not (export / "config.json").exists():
        run("export", str(mended), str(export), "--to", "dense")
    size = ["--batch-size", str(args.batch_size), "--task-path", str(task_files()), "--cache", str(CACHE)]
    rows: list[dict[str, Any]] = []
    for limit, tasks in by_limit(args.limit, args.gsm8k_limit).items():
        ours, _ = run("eval", str(dense), str(mended), "--tasks", ",".join(tasks), "--limit", str(limit), *size)
        rows += merged(ours)
    rows.sort(key=lambda row: TASKS.index(row["task"]))
    if harness_limit:
        same, _ = run("eval", str(mended), "--tasks", ",".join(TASKS), "--limit", str(harness_limit), *size)
        theirs = harness(export, harness_limit, args.batch_size)
        for row, score in zip(rows, same["models"][0]["scores"], strict=True):
            value = theirs[score["task"]][f"{score['metric']},{score['filter']}"]
            row["mended_at_harness_limit"], row["harness_on_export"] = score["value"], value
            row["difference"] = abs(value - score["value"])
    versions = ", ".join(f"{name} {version}" for name, version in ours["versions"].items())
    notes = (
        f"mendlm eval DENSE MENDED --tasks {','.join(TASKS)} --limit {args.limit} --batch-size {args.batch_size}"
        f"{'' if args.gsm8k_limit is None else f', GSM8K --limit {args.gsm8k_limit}'}; "
        f"mended: {' '.join(shown(MENDED))} --calibration calibration.txt; harness_on_export: lm_eval run --model hf "
        f"on the dense export, --limit {harness_limit}; {versions}"
    )
    report("tasks", "cpu", rows, notes)
    replace_block(ROOT / "docs" / "tasks.md", "tasks", page(rows, harness_limit))


def by_limit(limit: int, gsm8k_limit: int | None) -> dict[int, list[str]]:
    """The tasks to run with each limit."""
    limits: dict[int, list[str]] = {}
    for task in TASKS:
        few = gsm8k_limit if task == "gsm8k_local" else None
        limits.setdefault(limit if few is None else few, []).append(task)
    return limits


def task_files() -> Path:
    path = ROOT.parent / "shared" / "data" / "lm_eval_tasks"
    if not path.exists():
        sys.exit(f"the task files {path.name} are not at hand; figures of other documents do not compare")
    return path


def merged(ours: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a score, dense and mended side by side."""
    rows = []
    for dense, mended in zip(*(model["scores"] for model in ours["models"]), strict=True):
        facts = ours["tasks"][dense["task"]]
        rows.append(
            {
                "task": dense["task"],
                "metric": dense["metric"] if dense["filter"] == "none" else f"{dense['metric']} ({dense['filter']})",
                "version": facts["version"],
                "shots": facts["n_shot"],
                "documents": facts["n_documents"],
                "dense": dense["value"],
                "dense_stderr": dense["stderr"],
                "mended": mended["value"],
                "mended_stderr": mended["stderr"],
            }
        )
    return rows


def harness(folder: Path, limit: int, batch_size: int) -> dict[str, Any]:
    """Results of the harness's own command, nothing of mendlm in its process."""
    out = WORK / "harness" / str(limit)
    options = ["--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu", "--batch_size", str(batch_size)]
    options += ["--include_path", str(task_files()), "--tasks", ",".join(TASKS), "--limit", str(limit)]
    options += ["--use_cache", str(WORK / "harness" / "answers"), "--output_path", str(out)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", *options]
    subprocess.run(command, env=dict(os.environ | offline), check=True)
    newest = max(out.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    results: dict[str, Any] = json.loads(newest.read_text())["results"]
    return results


def page(rows: list[dict[str, Any]], harness_limit: int) -> str:
    """The table of the page."""
    names = dict(zip(TASKS, NAMES, strict=True))
    lines = [["task", "shots", "documents", "metric", "dense", "mended"]]
    for row in rows:
        scores = [f"{row[name]:.3f} ± {row[f'{name}_stderr']:.3f}" for name in ("dense", "mended")]
        lines.append([names[row["task"]], str(row["shots"]), str(row["documents"]), row["metric"], *scores])
    if not harness_limit:
        return table(lines)
    largest = max(row["difference"] for row in rows)
    checked = [["task", "metric", "`mendlm eval`, compressed folder", "`lm_eval run`, its dense export"]]
    for row in rows:
        pair = [f"{row[name]:.4f}" for name in ("mended_at_harness_limit", "harness_on_export")]
        checked.append([names[row["task"]], row["metric"], *pair])
    said = f"On the first {harness_limit} documents of each task; the largest difference is {largest:.1g}:"
    return f"{table(lines)}\n\n{said}\n\n{table(checked)}"


if __name__ == "__main__":
    main()
