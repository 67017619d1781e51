"""A causal language model at work: opened from a folder in a compute dtype, reading tokens with a key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mendlm.devices import DTYPES
from mendlm.errors import UsageError
from mendlm.evaluation._logits import device_of
from mendlm.names import lookup


def inference_dtype(dtype: str | torch.dtype | None, device: str | torch.device | None) -> torch.dtype | None:
    """The compute dtype meant: the one given, else float32 on a CPU and None, the checkpoint's, elsewhere.

    Raises
    ------
    UsageError : unknown name.
    """
    if isinstance(dtype, str):
        return lookup(DTYPES, dtype, "dtype")
    if dtype is None and (device is None or str(device).startswith("cpu")):
        return torch.float32
    return dtype


def open_model(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    runtime: str | None = None,
) -> Any:
    """`mendlm.load` with the dtype of `inference_dtype`; None is the loader's default."""
    from mendlm.loading import load

    return load(folder, runtime=runtime or "auto", dtype=inference_dtype(dtype, device), device=device)


def runtimes_of(folders: Sequence[str | Path], runtime: str | None) -> list[str | None]:
    """The `runtime` to open each folder with, None for dense ones, which have no choice, beside compressed ones.

    Where nothing is compressed all get it, and loading refuses it.

    Raises
    ------
    UsageError, CheckpointError : as `is_compressed`.
    """
    from mendlm.loading import is_compressed

    compressed = [is_compressed(folder) for folder in folders]
    return [runtime if own or not any(compressed) else None for own in compressed]


def dtype_of(model: Any) -> str:
    """Name of the dtype of the embedding, for reports."""
    return str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")


def vocab_size(model: Any) -> int:
    """Rows of the input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


class CachedReader:
    """Feeds a model piece by piece: a prompt, then one token at a time, each with the cache of what came before.

    Parameters
    ----------
    model : a transformers causal LM in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = device_of(model)
        self._cache: Any = None
        # Logits of a whole prompt would be (n, vocab); only the last row is wanted.
        knows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if knows else {})

    def read(self, ids: Tensor) -> Tensor:
        """Logits (batch, vocab) after the next tokens `ids` (batch, n), int64, of every sequence.

        Raises
        ------
        UsageError : the model keeps no key-value cache.
        """
        with torch.inference_mode():
            out = self._model(input_ids=ids.to(self._device), past_key_values=self._cache, **self._options)
        self._cache = getattr(out, "past_key_values", None)
        if self._cache is None:
            raise UsageError(f"{type(self._model).__name__} keeps no key-value cache, which is needed here.")
        logits: Tensor = out.logits[:, -1]
        return logits
