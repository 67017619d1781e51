"""Statistics of the inputs of linear layers, gathered while a block runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mendlm.errors import NonFiniteError, located
from mendlm.inputs import InputStats
from mendlm.linalg import all_finite

# Rows of a Gram matrix computed at a time. Only the part right of the diagonal is computed, in strips of this many
# rows: 2 / 3 of the flops at d_in = 3 strips, half of them in the limit.
_STRIP = 512
# Rows whose entries and sizes are summed at a time: a part that stays in the cache. 8,192 rows of 1,536 inputs take
# 8 ms instead of 27, where the Gram matrix takes 350 and the second moments alone 110.
_ROWS = 256


class InputAccumulator:
    """Sums over the rows of X, batch by batch; products in float32, sums over batches in float64.

    Means and mean sizes are gathered always: they cost two passes over X.

    Parameters
    ----------
    d_in : columns of X.
    gram : whether to gather the Gram matrix, or its diagonal alone, the second moments.
    device : where X is.

    Notes
    -----
    Memory: ``8 d_in ** 2`` bytes with the Gram matrix, ``16 d_in`` for the means. Cost of `add`: about ``d_in ** 2``
    multiply-adds a row with the Gram matrix, ``d_in`` without.

    Squares are rounded to float32, so that ``second_moment - mean ** 2`` has no digit of the variance of an input whose
    mean is 3,000 and more times its standard deviation.
    """

    def __init__(self, d_in: int, *, gram: bool, device: torch.device) -> None:
        self.n_tokens = 0
        shape = (d_in, d_in) if gram else (d_in,)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._first = torch.zeros((2, d_in), dtype=torch.float64, device=device)  # of x and of |x|

    def add(self, X: Tensor) -> None:
        """Take in the rows of `X` (…, d_in)."""
        X = X.reshape(-1, X.shape[-1])
        X = X if X.dtype == torch.float64 else X.float()
        self.n_tokens += X.shape[0]
        for part in torch.split(X, _ROWS):
            self._first[0] += part.sum(dim=0)
            self._first[1] += part.abs().sum(dim=0)
        if self._sum.ndim == 1:
            self._sum += X.square().sum(dim=0, dtype=torch.float64)
            return
        d_in = X.shape[1]
        for first in range(0, d_in, _STRIP):
            last = min(first + _STRIP, d_in)
            self._sum[first:last, first:] += X[:, first:last].T @ X[:, first:]

    def result(self) -> InputStats:
        """The statistics of all rows; nothing can be added afterwards.

        Raises
        ------
        NonFiniteError : a row held NaN or infinity, or its square overflowed.
        """
        if not all_finite(self._sum):
            raise NonFiniteError(
                "the inputs of this layer hold NaN or infinity on the calibration text. Calibrate in float32 "
                "(--calibration-dtype float32), or repair the checkpoint."
            )
        n = max(self.n_tokens, 1)
        mean, mean_abs = self._first / n
        if self._sum.ndim == 1:
            return InputStats(self.n_tokens, self._sum / n, None, mean, mean_abs)
        gram = self._sum.div_(n).triu_()
        gram += gram.triu(1).T
        return InputStats(self.n_tokens, gram.diagonal().clone(), gram, mean, mean_abs)


class InputGatherer:
    """Watches the inputs of some layers of a block; layers that are called with the same tensor share statistics.

    Parameters
    ----------
    layers : key -> layer whose inputs to watch.
    d_in : key -> number of inputs.
    gram : whether to gather Gram matrices.
    device : where the block runs.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], d_in: Mapping[str, int], *, gram: bool, device: torch.device
    ) -> None:
        self._layers, self._d_in, self._gram, self._device = layers, d_in, gram, device
        self._leader: dict[str, str] = {}  # the layer whose statistics a layer shares
        self._sums: dict[str, InputAccumulator] = {}
        self._current: dict[str, Tensor] = {}  # leader -> its input in this batch

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take in the inputs of every call of the layers meanwhile."""
        handles = [layer.register_forward_pre_hook(self._hook(key)) for key, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._current.clear()

    def batch_ends(self) -> None:
        """Forget the tensors of this batch, so that their memory is free."""
        self._current.clear()

    def results(self) -> dict[str, InputStats]:
        """Key -> statistics; the same object for layers that share their inputs.

        Raises
        ------
        NonFiniteError : as `InputAccumulator.result`; the message names the layer.
        """
        found: dict[str, InputStats] = {}
        for key in self._layers:
            leader = self._leader.get(key)
            if leader is None:  # an expert that no token reached
                found[key] = InputAccumulator(self._d_in[key], gram=self._gram, device=self._device).result()
            elif leader not in found:
                try:
                    found[leader] = self._sums.pop(leader).result()
                except NonFiniteError as err:
                    raise located(err, leader) from err
            if leader is not None:
                found[key] = found[leader]
        return found

    def _hook(self, key: str) -> Any:
        def take_in(layer: nn.Module, args: tuple[Any, ...]) -> None:
            X = args[0]
            if key not in self._leader:
                shared = next((leader for leader, seen in self._current.items() if seen is X), None)
                # A layer joins another only with its first call, so that both have seen the same rows.
                joins = shared is not None and self._sums[shared].n_tokens == X.numel() // X.shape[-1]
                self._leader[key] = shared if joins and shared is not None else key
                if self._leader[key] == key:
                    self._sums[key] = InputAccumulator(X.shape[-1], gram=self._gram, device=self._device)
            if self._leader[key] == key:
                self._current[key] = X
                self._sums[key].add(X)
            elif self._current.get(self._leader[key]) is not X:
                raise RuntimeError(f"{key!r} read the same inputs as {self._leader[key]!r} once, and now others.")

        return take_in
