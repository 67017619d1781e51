"""Logits of a causal language model a few positions at a time, and the NLL and divergence they give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mendlm.errors import UsageError

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


def token_nll(logits_of: LogitsOf, ids: Tensor, chunk: int) -> Tensor:
    """NLL in nats of tokens 2 to seqlen of the window `ids` (seqlen,), `chunk` positions at a time: (seqlen - 1,).

    Computed in float32, returned in float64 on the CPU.
    """
    return torch.cat([_nll(logits_of(start, stop), ids, start) for start, stop in _chunks(ids, chunk)])


class TokenComparison(NamedTuple):
    """Two models on one window, token by token: each (seqlen - 1,), float64 on the CPU."""

    nll: Tensor
    reference_nll: Tensor
    kl: Tensor  # KL(reference || model) in nats
    agrees: Tensor  # 1 where both models hold the same token the likeliest, else 0


def token_comparison(logits_of: LogitsOf, reference_of: LogitsOf, ids: Tensor, chunk: int) -> TokenComparison:
    """Compare what two models predict at positions 1 to seqlen - 1 of the window `ids` (seqlen,), `chunk` at a time.

    NLL is that of `token_nll`. KL is computed in float64: in float32 its rounding would exceed the divergence of models
    that are the same to six digits.

    Raises
    ------
    UsageError : the models' logits are over vocabularies of different sizes.
    """
    parts = []
    for start, stop in _chunks(ids, chunk):
        logits = logits_of(start, stop)
        reference = reference_of(start, stop).to(logits.device)
        if logits.shape != reference.shape:
            n, m = logits.shape[-1], reference.shape[-1]
            raise UsageError(
                f"the model gives logits for {n} tokens and the reference for {m}; KL needs one vocabulary. If only "
                f"rows that pad the embedding differ, cut both models with resize_token_embeddings({min(n, m)}); "
                "otherwise compare perplexities alone, without a reference."
            )
        agrees = (logits.argmax(-1) == reference.argmax(-1)).double().cpu()
        nll, reference_nll = _nll(logits, ids, start), _nll(reference, ids, start)
        parts.append((nll, reference_nll, _divergence(reference, logits).cpu(), agrees))
    return TokenComparison(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _chunks(ids: Tensor, chunk: int) -> Iterator[tuple[int, int]]:
    last = ids.numel() - 1
    for start in range(0, last, chunk):
        yield start, min(start + chunk, last)


def _nll(logits: Tensor, ids: Tensor, start: int) -> Tensor:
    """NLL of the tokens after positions `start` on, whose `logits` (n, vocab) are given: (n,), float64 on the CPU."""
    targets = ids[start + 1 : start + 1 + logits.shape[0]].to(logits.device)
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").cpu().double()


def _divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || model) of each row of logits (n, vocab): (n,), float64."""
    log_p = reference.double().log_softmax(-1)
    terms = log_p - logits.double().log_softmax(-1)
    p = log_p.exp_()
    terms.mul_(p).masked_fill_(p == 0, 0.0)  # p ln p is 0 at p = 0, also where a logit is -inf
    return terms.sum(-1).clamp_min_(0.0)  # below 0 by rounding alone


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
        largest = own.abs().nan_to_num(nan=0.0, posinf=0.0).max()
        bound = 2 * torch.finfo(own.dtype).eps * float(largest)
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
