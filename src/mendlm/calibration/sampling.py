"""Text that a model writes itself: calibration without data."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mendlm._quiet import quiet_transformers
from mendlm.calibration.products import quick_products
from mendlm.errors import NonFiniteError
from mendlm.evaluation._logits import device_of, eval_mode, text_config

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 256  # longest sample; longer windows are several samples in a row
BATCH_SIZE = 32  # samples that are written together

Progress = Callable[[int, int], None]
"""Called after every batch with (tokens sampled, tokens in all)."""


def sample_windows(
    checkpoint_folder: str | Path,
    n_sequences: int,
    seqlen: int,
    *,
    seed: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Tensor:
    """Windows of text sampled from the model in a folder.

    Parameters
    ----------
    checkpoint_folder : dense or compressed, as for `mendlm.load`.
    n_sequences, seqlen, seed, batch_size, progress : as for `sample`.
    device : where the model runs; None is the CPU.
    dtype : to run it in; None is float32 on a CPU, elsewhere the checkpoint's own.

    Returns
    -------
    (n_sequences, seqlen) int64 on the CPU.

    Raises
    ------
    UsageError, CheckpointError : the model cannot be loaded.
    NonFiniteError : its logits are not finite.

    Notes
    -----
    Unlike everything else in a calibrated run, this needs **the whole model in memory**, and the keys and values of
    `batch_size` samples. Both are freed before it returns.
    """
    from mendlm.loading import load

    if dtype is None and torch.device(device or "cpu").type == "cpu":
        dtype = torch.float32
    model = load(checkpoint_folder, device=device, dtype=dtype)
    try:
        return sample(model, n_sequences, seqlen, seed=seed, batch_size=batch_size, progress=progress)
    finally:
        on_gpu = device_of(model).type == "cuda"
        del model
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


def sample(
    model: Any,
    n_sequences: int,
    seqlen: int,
    *,
    seed: int,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Tensor:
    """Windows of text sampled from a model at temperature 1, from its full distribution.

    A window of more than `SAMPLE_TOKENS` tokens is put together from independent samples of equal length: the cost per
    token stays that of short contexts, and short samples are enough. Wanda pruning of SmolLM2-135M to 50 % gives
    perplexity 43.7 on WikiText-2 with statistics of 8 x 256 such tokens, within 10 % of the 40.6 that 16 x 1024 tokens
    of WikiText-2 itself give.

    Parameters
    ----------
    model : a transformers causal LM.
    n_sequences, seqlen : number and length of windows, seqlen >= 2.
    seed : of the samples, >= 0.
    batch_size : samples written together. Another batch size gives other samples.
    progress : called after every batch.

    Returns
    -------
    (n_sequences, seqlen) int64 on the CPU. Each sample begins with the token it was started from: the model's BOS, its
    EOS if it has no BOS, a random token if it has neither. After an EOS the model goes on writing.

    Raises
    ------
    NonFiniteError : logits are NaN or infinite.

    Notes
    -----
    ``generate`` with its key-value cache, and nothing from the checkpoint's ``generation_config``: no top-k, no top-p,
    no repetition penalty. torch's global generators are seeded inside and put back. The same seed gives the same
    tokens on the same device and build of torch.
    """
    n_parts = -(-seqlen // SAMPLE_TOKENS)
    length = -(-seqlen // n_parts)
    starts = _start_ids(model, n_sequences * n_parts, torch.Generator().manual_seed(seed))
    samples: list[Tensor] = []
    quick = quick_products(device_of(model), model.dtype)
    with _seeded(seed, device_of(model)), quiet_transformers(), eval_mode(model), _own_generation_config(model), quick:
        for batch in torch.split(starts, batch_size):
            samples.append(_continued(model, batch, length))
            done = sum(map(len, samples)) * length
            logger.info("sampled %d of %d tokens", done, len(starts) * length)
            if progress is not None:
                progress(done, len(starts) * length)
    return torch.cat(samples).view(n_sequences, n_parts * length)[:, :seqlen].contiguous()


def _continued(model: Any, starts: Tensor, length: int) -> Tensor:
    """(n, length) int64: what the model writes after each of `starts` (n,)."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=length - 1,
        use_cache=True,
    )
    prompt = starts[:, None].to(device_of(model))
    try:
        ids: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    except RuntimeError as err:
        if "probability tensor" not in str(err):
            raise
        raise NonFiniteError(
            "the model's logits hold NaN or infinity, so it cannot write calibration text. Check its weights, or "
            "calibrate with dtype float32."
        ) from err
    return ids.cpu()


def _start_ids(model: Any, n: int, generator: torch.Generator) -> Tensor:
    """(n,) int64: the token that every sample starts from."""
    vocab = model.get_input_embeddings().weight.shape[0]
    for name in ("bos_token_id", "eos_token_id"):
        for config in (text_config(model), model.generation_config):
            value = getattr(config, name, None)
            token = value[0] if isinstance(value, list | tuple) and value else value
            if type(token) is int and 0 <= token < vocab:
                return torch.full((n,), token, dtype=torch.int64)
    return torch.randint(vocab, (n,), generator=generator)


@contextlib.contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """No generation settings of the checkpoint for a while: `generate` fills what it is not told from them.

    Without an EOS in them nothing ends a sample early, and nothing keeps the model from writing an EOS.
    """
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators that sampling on `device` uses; they are put back afterwards."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        # Not torch.manual_seed, which would seed every GPU.
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
