"""Hypothesis strategies for matrices, masks and patterns."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from mendlm import NM, Unstructured
from mendlm.patterns import Pattern


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
def patterns_for(draw: st.DrawFn, d_in: int) -> Pattern:
    """A pattern that fits `d_in`, sparsity 0 and 1 included."""
    divisors = [m for m in range(2, d_in + 1) if d_in % m == 0]
    if divisors and draw(st.booleans()):
        m = draw(st.sampled_from(divisors))
        return NM(draw(st.integers(0, m - 1)), m)
    sparsity = draw(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)))
    return Unstructured(sparsity, draw(st.sampled_from(["tensor", "row"])))
