"""Logits of a causal language model a few positions at a time, and the NLL they give: the model-aware part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

PROBE_TOKENS = 16  # length of the prefix on which chunked and whole logits are compared

LogitsOf = Callable[[int, int], Tensor]
"""Logits (stop - start, vocab) of positions start to stop of one window."""


def text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextlib.contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Eval mode for a while; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def device_of(model: Any) -> torch.device:
    """Where token ids go: the device of the input embedding."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def window_nll(logits_of: LogitsOf, ids: Tensor, chunk: int) -> float:
    """Sum of the NLL in nats of tokens 2 to seqlen of the window `ids` (seqlen,), `chunk` positions at a time."""
    total, last = 0.0, ids.numel() - 1
    for start in range(0, last, chunk):
        stop = min(start + chunk, last)
        logits = logits_of(start, stop)
        targets = ids[start + 1 : stop + 1].to(logits.device)
        nll = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        total += float(nll.cpu().double().sum())
    return total


def logits_reader(model: Any, first: Tensor) -> tuple[Callable[[Tensor], LogitsOf], str]:
    """How to get at the logits of a window a few positions at a time, and the name of that way for the protocol.

    Chunked: the base model once, then the output embedding on each chunk, then what the config says happens to logits.
    Taken only if it agrees with the model's own forward on the first tokens of `first` (seqlen,); a model class may do
    anything else to its logits.
    """
    head = model.get_output_embeddings()
    base = getattr(model, "base_model", model)
    device = device_of(model)

    def chunked(ids: Tensor) -> LogitsOf:
        hidden = base(input_ids=ids[None].to(device), use_cache=False).last_hidden_state
        return lambda start, stop: _after_head(model, head(hidden[:, start:stop]))[0]

    def whole(ids: Tensor) -> LogitsOf:
        logits = model(input_ids=ids[None].to(device), use_cache=False).logits
        return lambda start, stop: logits[0, start:stop]

    probe = first[:PROBE_TOKENS]
    own = whole(probe)(0, probe.numel())
    if head is not None and base is not model:
        try:
            ours = chunked(probe)(0, probe.numel())
        except (AttributeError, RuntimeError):  # no last_hidden_state; head in another dtype or on another device
            ours = None
        # Same kernels on the same input: equal but for a rounding or two, unless something is done to the logits.
        bound = 2 * torch.finfo(own.dtype).eps * float(own.abs().max())
        if ours is not None and torch.allclose(ours.to(own.device, own.dtype), own, rtol=0.0, atol=bound):
            return chunked, "base model once, output embedding in chunks"
    return whole, "the model's own forward, a whole window of logits"


def _after_head(model: Any, logits: Tensor) -> Tensor:
    """Scaling and soft-capping of logits as the config states them (Granite, Cohere, Falcon-H1, Gemma 2)."""
    config = text_config(model)
    for name in ("logit_scale", "lm_head_multiplier"):
        if (factor := getattr(config, name, None)) is not None:
            logits = logits * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
