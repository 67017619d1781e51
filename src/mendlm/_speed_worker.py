"""One row of `mendlm.bench`, in a process of its own: loads a model, times it, says the numbers as a line of JSON."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mendlm._inference import CachedReader, dtype_of, open_model, vocab_size
from mendlm._memory import peak_memory_bytes
from mendlm._processes import answer_stream
from mendlm.devices import cpu_name
from mendlm.errors import UsageError
from mendlm.evaluation._logits import device_of, text_config
from mendlm.runtime import weight_tensors

WARM_UP_TOKENS = 4  # decoded before the clock runs
SEED = 0  # of the random prompts


def main(job: dict[str, Any]) -> None:
    """Write the numbers of `job` to stdout, or ``{"error": {"type": …, "message": …}}``."""
    answer_to = answer_stream()
    try:
        answer = measure(job)
    except Exception as err:  # noqa: BLE001 - the last frame of the process: the parent says it in a row of its table
        answer = {"error": {"type": type(err).__name__, "message": " ".join(str(err).split())[:500]}}
    answer_to.write(json.dumps(answer) + "\n")
    answer_to.flush()


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every repeat, bytes, and facts about the machine.

    Parameters
    ----------
    job : "folder", "runtime" (None for a dense one), "dtype" (None: the checkpoint's), "device", "threads" (None:
        torch's choice), "prompt_tokens", "new_tokens", "batch_size", "repeats".

    Raises
    ------
    UsageError : more tokens than the model has positions; and what `mendlm.load` raises.
    """
    import transformers

    from mendlm._quiet import quiet_transformers
    from mendlm.hf import empty_model

    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    # transformers imports what a model needs when it makes one: seconds, which are no part of the time to load.
    with quiet_transformers():
        empty_model(Path(job["folder"]))
    start = time.perf_counter()
    model = open_model(job["folder"], device=job["device"], dtype=job["dtype"], runtime=job["runtime"])
    device = device_of(model)
    _wait(device)
    load_seconds = time.perf_counter() - start
    _check_positions(model, job["prompt_tokens"], job["new_tokens"])
    shape = (job["batch_size"], job["prompt_tokens"])
    prompts = torch.randint(vocab_size(model), shape, generator=torch.Generator().manual_seed(SEED)).to(device)
    _round(model, prompts, min(WARM_UP_TOKENS, job["new_tokens"]))
    rounds = [_round(model, prompts, job["new_tokens"]) for _ in range(job["repeats"])]
    on_cuda = device.type == "cuda"
    return {
        "prefill_seconds": [prefill for prefill, _ in rounds],
        "decode_seconds": [decode for _, decode in rounds],
        "weights_bytes": sum(_bytes_by_storage(model).values()),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if on_cuda else None,
        "load_seconds": load_seconds,
        "file_bytes": sum(file.stat().st_size for file in Path(job["folder"]).glob("*.safetensors")),
        "facts": {
            "dtype": dtype_of(model),
            "threads": torch.get_num_threads(),
            "device_name": torch.cuda.get_device_name(device) if on_cuda else cpu_name(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _check_positions(model: Any, prompt_tokens: int, new_tokens: int) -> None:
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if positions is not None and prompt_tokens + new_tokens > positions:
        raise UsageError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones are more than the {positions} positions of the "
            "model. Use a smaller --prompt-tokens or --new-tokens."
        )


def _round(model: Any, prompts: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of reading `prompts` (batch, n) and of `new_tokens` greedy steps after them."""
    reader = CachedReader(model)
    start = time.perf_counter()
    tokens = reader.read(prompts).argmax(-1, keepdim=True)  # (batch, 1)
    _wait(prompts.device)
    middle = time.perf_counter()
    for _ in range(new_tokens):
        tokens = reader.read(tokens).argmax(-1, keepdim=True)
    _wait(prompts.device)
    return middle - start, time.perf_counter() - middle


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes_by_storage(model: Any) -> dict[int, int]:
    """Address -> size of every storage of the model's weights; tied ones count once."""
    found: dict[int, int] = {}
    for tensor in weight_tensors(model):
        for part in _parts(tensor):
            storage = part.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that `tensor` is made of: a subclass (2:4, say) may hold several."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(tensor, name))
