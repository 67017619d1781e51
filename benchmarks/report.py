"""`mendlm report` on SmolLM2-135M at 50 % and rank 16: time to build, size, time to open in headless Chromium.

python benchmarks/report.py [--folder OUT] [--evaluation FILE]… [--screenshot docs/images/report.png]

Needs mendlm[plot], playwright and a chromium; writes benchmarks/results/report-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _common import ROOT, report, smollm2

OUT = ROOT / "work" / "report-tlr16"
PAGE = ROOT / "work" / "report.html"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=OUT, help="compressed model; made if it is not there")
    parser.add_argument("--original", type=Path, help="dense model; SmolLM2-135M by default")
    parser.add_argument("--evaluation", type=Path, action="append", default=[], help="what mendlm eval --json printed")
    parser.add_argument("--screenshot", type=Path, help="picture of the top of the page")
    parser.add_argument("--repeats", type=int, default=5, help="times that the page is opened")
    options = parser.parse_args()
    original = options.original or smollm2()
    if not options.folder.exists():
        flags = ["--sparsity", "0.5", "--rank", "16", "--dtype", "bfloat16"]
        subprocess.run(
            [sys.executable, "-m", "mendlm", "compress", str(original), str(options.folder), *flags], check=True
        )
    command = [sys.executable, "-m", "mendlm", "report", str(options.folder), "-o", str(PAGE), "--overwrite", "--json"]
    command += ["--original", str(original)]
    for file in options.evaluation:
        command += ["--eval", str(file)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    opened, cpu = zip(*open_page(options.repeats, options.screenshot), strict=True)
    row = {
        "weights": sum(len(names) for names in result["tensors"].values()),
        "build_seconds": round(wall, 2),
        "build_cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "page_mb": round(result["n_bytes"] / 1e6, 3),
        "open_seconds": round(statistics.median(opened), 3),
        "open_seconds_best": round(min(opened), 3),
        "open_cpu_seconds": round(statistics.median(cpu), 3),
    }
    notes = (
        "open: from the start of the navigation until every chart that is shown is drawn; a fresh profile each time."
    )
    report("report", "cpu", [row], notes)


def open_page(repeats: int, screenshot: Path | None) -> list[tuple[float, float]]:
    """Seconds until everything is drawn, and processor time of all of the browser meanwhile, of each time."""
    import psutil
    from playwright.sync_api import sync_playwright

    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        sys.exit("there is no chromium to open the page in")
    seconds = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(repeats):
            context = browser.new_context(viewport={"width": 1180, "height": 1000})
            page = context.new_page()
            before = cpu_seconds(psutil.Process())
            page.goto(PAGE.as_uri())
            page.wait_for_selector("html[data-ready=yes]")
            cpu = cpu_seconds(psutil.Process()) - before
            seconds.append((page.evaluate("performance.getEntriesByName('drawn')[0].startTime") / 1000, cpu))
            if screenshot is not None:
                page.screenshot(path=screenshot)
            context.close()
        browser.close()
    return seconds


def cpu_seconds(process: Any) -> float:
    """Processor time of the processes that `process` started and that still run."""
    return sum(sum(child.cpu_times()[:2]) for child in process.children(recursive=True))


if __name__ == "__main__":
    main()
