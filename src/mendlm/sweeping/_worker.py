"""One point of a sweep, in a process of its own: compresses, evaluates, says the figures as a line of JSON."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mendlm
from mendlm._memory import peak_memory_bytes, trim
from mendlm._processes import answer_stream
from mendlm.checkpoints.staging import has_partial, is_filled
from mendlm.config import Recipe
from mendlm.devices import resolve_device
from mendlm.errors import MendError, UsageError
from mendlm.evaluation.perplexity import evaluate
from mendlm.pipeline import BlockStarted, CompressionResult, Event, TensorStarted, compress, plan
from mendlm.report.records import RUN_FILE

_GRACE_SECONDS = 20.0  # from the wish to stop to the end by force
_NOTE_SECONDS = 1.0  # between two notes about progress

Say = Callable[[dict[str, Any]], None]


def main(job: dict[str, Any]) -> None:
    """Write lines ``{"note": …}``, then ``{"figures": …}`` or ``{"error": {"type": …, "message": …}}`` to stdout.

    Stops, so that the work can go on another time, when stdin ends: its parent has closed it or is no more.
    """
    answer_to = answer_stream()

    def say(message: dict[str, Any]) -> None:
        answer_to.write(json.dumps(message) + "\n")
        answer_to.flush()

    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        say({"figures": measure(job, say)})
    except KeyboardInterrupt:
        sys.exit(130)
    except MendError as err:
        say({"error": {"type": type(err).__name__, "message": str(err)}})
    except MemoryError:
        say({"error": {"type": "MendError", "message": "out of memory."}})
    except Exception as err:  # noqa: BLE001 - the last frame of the process: the parent says it in the point's record
        say({"error": {"type": "MendError", "message": f"{type(err).__name__}: {' '.join(str(err).split())[:500]}"}})


def _stop_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_GRACE_SECONDS)
    os._exit(130)


def measure(job: dict[str, Any], say: Say) -> dict[str, Any]:
    """The figures of a `SweepRecord`.

    Parameters
    ----------
    job : "model"; "recipe" and "out", None for the model as it is; "text", "dataset", "n_windows", "seqlen" as in
        `mendlm.evaluation.perplexity.evaluate`; "device".
    say : called with ``{"note": text}`` now and then.

    Raises
    ------
    MendError : what `mendlm.compress` and `evaluate` raise.
    """
    figures: dict[str, Any] = {}
    if job["recipe"] is None:
        totals = plan(job["model"]).totals
        figures |= {"dense_bytes": totals.dense_bytes, "stored_bytes": totals.dense_bytes, "seconds": 0.0}
    else:
        figures |= _compressed(job, say)
        trim()

    def on_window(done: int, total: int, ppl: float) -> None:
        say({"note": f"window {done}/{total}"})

    result = evaluate(
        job["out"] or job["model"],
        text=job["text"],
        dataset=job["dataset"],
        n_windows=job["n_windows"],
        seqlen=job["seqlen"],
        device=resolve_device(job["device"]),
        progress=on_window,
    )
    if job["recipe"] is None:
        figures |= {"peak_memory_bytes": peak_memory_bytes(), "n_threads": torch.get_num_threads()}
    import transformers

    protocol = {name: result.protocol[name] for name in ("text", "text_sha256", "dtype")}
    return figures | {
        "ppl": result.to_dict()["ppl"],
        "nll": result.nll,
        "eval_seconds": round(result.seconds, 3),
        "evaluation": protocol | {"n_windows": result.n_windows, "seqlen": result.seqlen, "n_tokens": result.n_tokens},
        "device": job["device"],
        "versions": {
            "mendlm": mendlm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _compressed(job: dict[str, Any], say: Say) -> dict[str, Any]:
    """Compress, or go on with it, and say what it took."""
    out, last = Path(job["out"]), time.monotonic()

    def on_event(event: Event) -> None:
        nonlocal last
        if isinstance(event, BlockStarted):
            note = f"block {event.index}/{event.n_blocks}: {event.phase}"
        elif isinstance(event, TensorStarted):
            note = event.name
        else:
            return
        if time.monotonic() - last > _NOTE_SECONDS:
            last = time.monotonic()
            say({"note": note})

    def run(*, overwrite: bool) -> CompressionResult:
        return compress(
            job["model"],
            out,
            Recipe(**job["recipe"]),
            device=job["device"],
            overwrite=overwrite,
            resume=not overwrite,
            on_event=on_event,
        )

    try:
        result = run(overwrite=False)
    except UsageError:
        if not has_partial(out) and not is_filled(out):
            raise
        result = run(overwrite=True)  # another version of mendlm or torch left it
    facts = json.loads((out / RUN_FILE).read_text(encoding="utf-8"))
    errors = [record.rel_error for record in result.records]
    return {
        "dense_bytes": result.totals.dense_bytes,
        "stored_bytes": result.totals.stored_bytes,
        "mean_rel_error": sum(errors) / len(errors),
        **{name: facts[name] for name in ("seconds", "resumed", "peak_memory_bytes", "peak_device_bytes", "n_threads")},
    }
