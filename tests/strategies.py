"""Hypothesis strategies for matrices, masks and patterns, and calibration statistics."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from mendlm import NM, Unstructured
from mendlm.inputs import InputStats
from mendlm.patterns import Pattern, Tiles


def inputs_for(d_in: int, seed: int = 0, n_tokens: int | None = None) -> torch.Tensor:
    """Inputs X (n_tokens, d_in) float64: correlated through a third as many common factors, scales spread over 1 to 30.

    `n_tokens` is 4 d_in + 8 if not given, so that the Gram matrix is positive definite; with fewer than d_in it is
    singular.
    """
    rng = np.random.default_rng(seed)
    n_tokens = 4 * d_in + 8 if n_tokens is None else n_tokens
    n_factors = max(d_in // 3, 1)
    common = rng.standard_normal((n_tokens, n_factors)) @ rng.standard_normal((n_factors, d_in)) / np.sqrt(n_factors)
    scale = np.exp(rng.uniform(0, np.log(30), d_in))
    return torch.from_numpy((common + 0.5 * rng.standard_normal((n_tokens, d_in))) * scale)


def stats_for(d_in: int, seed: int = 0, n_tokens: int | None = None) -> InputStats:
    """All statistics of `inputs_for` with the same arguments."""
    X = inputs_for(d_in, seed, n_tokens)
    gram = X.T @ X / X.shape[0]
    return InputStats(X.shape[0], X.square().mean(dim=0), gram, X.mean(dim=0), X.abs().mean(dim=0))


@st.composite
def matrices(draw: st.DrawFn, *, max_side: int = 24, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random matrices; some with few distinct values (ties), some with zero rows, some all zero."""
    d_out, d_in = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    W = rng.standard_normal((d_out, d_in))
    kind = draw(st.sampled_from(["normal", "normal", "ties", "zero rows", "zero"]))
    if kind == "ties":
        W = np.round(W)
    elif kind == "zero rows":
        W[rng.random(d_out) < 0.3] = 0
    elif kind == "zero":
        W[:] = 0
    return torch.from_numpy(W).to(dtype)


@st.composite
def patterns_for(draw: st.DrawFn, d_in: int, d_out: int | None = None) -> Pattern:
    """A pattern that fits `d_in`, sparsity 0 and 1 included; tiles too if `d_out` is given."""
    kind = draw(st.sampled_from(["unstructured", "nm", "tiles"]))
    divisors = [m for m in range(2, d_in + 1) if d_in % m == 0]
    if kind == "nm" and divisors:
        m = draw(st.sampled_from(divisors))
        return NM(draw(st.integers(0, m - 1)), m)
    sparsity = draw(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)))
    if kind == "tiles" and d_out is not None:
        rows = draw(st.sampled_from([side for side in range(1, d_out + 1) if d_out % side == 0]))
        cols = draw(st.sampled_from([1, *divisors]))
        return Tiles(sparsity, rows, cols)
    return Unstructured(sparsity, draw(st.sampled_from(["tensor", "row"])))
