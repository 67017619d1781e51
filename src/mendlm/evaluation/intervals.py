"""Confidence intervals of means over a text, from contiguous blocks of tokens: batch means and Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LEVEL = 0.95
MIN_BLOCKS, MAX_BLOCKS = 8, 16  # more narrow the interval little (Schmeiser 1982), and longer blocks correlate less
MIN_BLOCK_TOKENS = 256  # below, what one block gives still tells much about the next one


def block_lengths(n_windows: int, n_predicted: int) -> list[int]:
    """How many tokens each block of a text has.

    A block is a run of neighbouring tokens: several whole windows, one, or an equal part of one.

    Parameters
    ----------
    n_windows : windows of the text, >= 1.
    n_predicted : predicted tokens of each, seqlen - 1 >= 1.

    Returns
    -------
    list of int with the sum n_windows * n_predicted. Whole windows where there are `MIN_BLOCKS` of them, several to a
    block above `MAX_BLOCKS`; below, windows are cut into as few equal parts as give `MIN_BLOCKS` blocks. Fewer blocks
    where these would be shorter than `MIN_BLOCK_TOKENS`. Lengths differ by one window at most, or by one token where
    windows are cut.
    """
    affordable = n_windows * (n_predicted + 1) // MIN_BLOCK_TOKENS
    if n_windows >= min(MIN_BLOCKS, affordable):
        return [n * n_predicted for n in _shares(n_windows, max(1, min(n_windows, MAX_BLOCKS, affordable)))]
    parts = min(-(-MIN_BLOCKS // n_windows), affordable // n_windows)
    return _shares(n_predicted, max(1, parts)) * n_windows


def block_means(values: Tensor) -> list[float]:
    """Means over blocks of `values` (n_windows, n_predicted), in the order of the text."""
    lengths = block_lengths(*values.shape)
    return [float(part.double().mean()) for part in torch.split(values.flatten(), lengths)]


def mean_interval(means: Sequence[float], lengths: Sequence[int]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean over tokens.

    Parameters
    ----------
    means : of each block.
    lengths : tokens of each block, as many.

    Returns
    -------
    (low, high) around the mean over all tokens; None for fewer than two blocks.

    Notes
    -----
    The mean is a ratio, sum of blocks over their tokens. Its variance is that of the blocks about it, each weighted by
    its length, with n - 1 degrees of freedom; for blocks of one length this is the t interval of their mean. It assumes
    blocks to be independent of each other, not tokens.
    """
    n, total = len(means), sum(lengths)
    if n < 2:
        return None
    mean = math.fsum(m * k for m, k in zip(means, lengths, strict=True)) / total
    squares = math.fsum((k * (m - mean)) ** 2 for m, k in zip(means, lengths, strict=True))
    half = t_quantile(n - 1) * math.sqrt(n / (n - 1) * squares) / total
    return mean - half, mean + half


def exp_interval(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """The interval of exp(x) from that of x."""
    return None if interval is None else (exp(interval[0]), exp(interval[1]))


def exp(nll: float) -> float:
    """exp(nll), infinite where that overflows."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def plain(value: Any) -> Any:
    """A field of a result for JSON, which has neither infinity nor tuples: None and a list in their place."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def t_quantile(df: int, level: float = LEVEL) -> float:
    """The t with P(-t < T < t) = `level` for Student's T with `df` >= 1 degrees of freedom.

    Notes
    -----
    The probability is a finite sum for whole `df` (Abramowitz and Stegun, 26.7.3 and 26.7.4) in the angle atan(t /
    sqrt(df)), which bisection finds to the last bit or two.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _within(middle, df) < level:
            low = middle
        else:
            high = middle
    return math.tan(high) * math.sqrt(df)


def _within(theta: float, df: int) -> float:
    """P(|T| < tan(theta) * sqrt(df))."""
    cos2 = math.cos(theta) ** 2
    odd = df % 2
    total = 0.0 if df == 1 else 1.0
    term = 1.0
    for i in range(2 + odd, df - 1, 2):  # the factor that leads from one term to the next: (i - 1) / i * cos²
        term *= (i - 1) / i * cos2
        total += term
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * math.cos(theta) * total)
    return math.sin(theta) * total


def _shares(total: int, n: int) -> list[int]:
    """`total` in `n` whole parts that differ by one at most."""
    return [total * (i + 1) // n - total * i // n for i in range(n)]
