"""The output of a block with other weights than its own, and how far it is from what it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[Callable[..., Any], Tensor], Tensor]
"""Called with something that is called like a block and hidden states (batch, seqlen, hidden); its output."""

_TINY = 1e-30  # of a target that is zero


def run_with(block: nn.Module, forward: Forward, parameters: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Output of a loaded block for hidden states (batch, seqlen, hidden), some of its parameters by name replaced."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(block, dict(parameters), args, kwargs)

    return forward(call, hidden)


def token_errors(out: Tensor, target: Tensor) -> Tensor:
    """Squared error of every token (batch, seqlen), float32, relative to the token's target."""
    target = target.float()
    # Norms of tokens differ by orders of magnitude (the first token's most of all) and the next norm takes them away.
    return (out.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(_TINY)


def output_error(
    block: nn.Module,
    forward: Forward,
    parameters: Mapping[str, Tensor],
    states: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
) -> float:
    """Mean over the tokens of ``||f(X; parameters) - Y||^2 / ||Y||^2``.

    Parameters
    ----------
    block : loaded. Not modified.
    forward : runs it.
    parameters : name in the block -> what it has instead, on `device`.
    states : hidden states X and what the output should be, Y, (batch, seqlen, hidden) each; at least one token.
    device : where the block is.
    """
    total, n_tokens = 0.0, 0
    with torch.no_grad():
        for hidden, output in states:
            errors = token_errors(run_with(block, forward, parameters, hidden.to(device)), output.to(device))
            total += float(errors.sum(dtype=torch.float64))
            n_tokens += errors.numel()
    return total / n_tokens
