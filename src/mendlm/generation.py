"""`generate`: what a checkpoint folder, compressed or dense, writes after a prompt, to see what compression did."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mendlm._inference import CachedReader, dtype_of, inference_dtype, open_model, vocab_size
from mendlm.devices import resolve_device
from mendlm.errors import CheckpointError, MissingDependencyError, NonFiniteError, UsageError
from mendlm.evaluation._logits import device_of, text_config
from mendlm.evaluation.text import load_tokenizer, tokenize
from mendlm.loading import is_compressed
from mendlm.runtime import SparseLowRankLinear, resolve_runtime

CONTEXT_TOKENS = 6  # of the prompt that are decoded with the first new ones: a space may hang on what is before it

OnText = Callable[[str], None]
"""Called with each piece of text as it comes; the pieces joined are the whole text."""


@dataclass(frozen=True)
class Generation:
    """A text and how it came about.

    Attributes
    ----------
    model : the folder.
    prompt : as given.
    text : what the model wrote after it, without special tokens.
    n_prompt_tokens : tokens that the model read, those that the tokenizer or its chat template adds included.
    n_new_tokens : tokens that the model made, the one that ended the text included.
    stopped : why it ended: "end" (the model's end token), "length" (max_new_tokens) or "positions" (the model has no
        more).
    prefill_tokens_per_second : n_prompt_tokens over the time until the first new token was known.
    decode_tokens_per_second : the other new tokens over their time; None if there is only one.
    settings : plain values (JSON): max_new_tokens, temperature, top_p, seed, chat, device, dtype, runtime (None for a
        dense model).
    """

    model: str
    prompt: str
    text: str
    n_prompt_tokens: int
    n_new_tokens: int
    stopped: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return asdict(self)


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    runtime: str | None = None,
    on_text: OnText | None = None,
) -> Generation:
    """Let the model in a folder go on from a prompt.

    Parameters
    ----------
    model : folder of a dense transformers checkpoint, or one that mendlm wrote. Nothing is downloaded.
    prompt : text, not blank.
    max_new_tokens : int >= 1.
    temperature : >= 0. 0 takes the likeliest token every time; above, tokens are drawn from softmax(logits / it).
    top_p : in (0, 1]. Draws are from the likeliest tokens that together have this probability.
    seed : of the draws, which are made on the CPU whatever the device.
    chat : wrap the prompt in the tokenizer's chat template, as a user's message.
    device : where to run; CPU if None.
    dtype : compute dtype, a `torch.dtype` or its name; None is float32 on a CPU, elsewhere the checkpoint's.
    runtime : how compressed layers compute; None is the loader's default. Dense models have no choice.
    on_text : called with each piece of text as it comes.

    Returns
    -------
    Generation

    Raises
    ------
    UsageError : no such folder, a blank prompt or one that is longer than the model's positions, a setting out of
        range, no chat template.
    CheckpointError : the model or its tokenizer cannot be loaded.
    NonFiniteError : the logits hold NaN or +infinity.

    Notes
    -----
    One forward for the prompt, then one a token with a key-value cache. Of the checkpoint's generation_config.json only
    the end tokens are used, so that two models are asked in the same way.
    """
    return generate_each(
        [model],
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        device=device,
        dtype=dtype,
        runtime=runtime,
        on_text=None if on_text is None else lambda _, piece: on_text(piece),
    )[0]


def generate_each(
    models: Sequence[str | Path],
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    runtime: str | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """`generate` for several folders, one after the other; one model is in memory at a time.

    All prompts are tokenised, each with its model's own tokenizer, before the first model is loaded. `runtime` is for
    the compressed folders among `models`, of which there must be one. `on_text` is called with the index of the model
    and the piece of text. The rest is as in `generate`.
    """
    how = _Sampling(max_new_tokens, temperature, top_p, seed)
    _check(how, prompt)
    inference_dtype(dtype, device)
    if device is not None:
        resolve_device(str(device))
    compressed = [is_compressed(model) for model in models]
    if runtime is not None:
        resolve_runtime(runtime)
        if not any(compressed) and runtime != "auto":
            raise UsageError(
                f"{str(models[0])!r} is not compressed by mendlm: there is no runtime {runtime!r} to choose."
            )
    tokenizers = [load_tokenizer(model) for model in models]
    prompts = [_prompt_ids(tok, prompt, chat, model) for tok, model in zip(tokenizers, models, strict=True)]
    results = []
    for index, (model, packed, tokenizer, ids) in enumerate(zip(models, compressed, tokenizers, prompts, strict=True)):

        def on_piece(piece: str, index: int = index) -> None:
            if on_text is not None and piece:
                on_text(index, piece)

        loaded = open_model(model, device=device, dtype=dtype, runtime=runtime if packed else None)
        written = _write(loaded, tokenizer, ids, how, on_piece)
        settings = how._asdict() | {
            "chat": chat,
            "device": str(device_of(loaded)),
            "dtype": dtype_of(loaded),
            "runtime": _runtime_of(loaded) if packed else None,
        }
        results.append(Generation(model=str(model), prompt=prompt, settings=settings, **written))
        del loaded  # before the next one comes
    return results


def _runtime_of(model: Any) -> str:
    """The runtime of a compressed model: "auto" depends on the device. Merging may put the original modules back."""
    return next((part.runtime for part in model.modules() if isinstance(part, SparseLowRankLinear)), "merged")


class _Sampling(NamedTuple):
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def _check(how: _Sampling, prompt: str) -> None:
    if not prompt.strip():
        raise UsageError("the prompt is empty. Give some text to go on from.")
    try:
        prompt.encode()
    except UnicodeEncodeError as err:
        raise UsageError("the prompt is not UTF-8 text. Convert it first, e.g. with iconv -t utf-8.") from err
    for name in ("max_new_tokens", "seed"):
        if not isinstance(value := getattr(how, name), int):
            raise UsageError(f"{name} must be a whole number, got {value!r}.")
    if how.max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {how.max_new_tokens!r}.")
    if not (how.temperature >= 0 and math.isfinite(how.temperature)):
        raise UsageError(f"temperature must be 0 (greedy) or a positive number, got {how.temperature!r}.")
    if not 0 < how.top_p <= 1:
        raise UsageError(f"top_p must be in (0, 1], got {how.top_p!r}.")
    if how.top_p < 1 and how.temperature == 0:
        raise UsageError(
            f"top_p {how.top_p!r} has no effect at temperature 0, which takes the likeliest token every time. Raise "
            "temperature, or leave top_p out."
        )
    if not 0 <= how.seed < 2**63:
        raise UsageError(f"seed must be in [0, 2**63), got {how.seed!r}.")


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool, folder: str | Path) -> list[int]:
    if not chat:
        ids = tokenize(tokenizer, prompt, special_tokens=True)
    elif not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"the tokenizer in {str(folder)!r} has no chat template. Leave out --chat.")
    else:
        message = [{"role": "user", "content": prompt}]
        try:
            wrapped = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        except ImportError as err:
            raise MissingDependencyError(f"chat templates need jinja2: pip install jinja2 ({err}).") from err
        except Exception as err:  # a template is a program: anything can be raised
            reason = " ".join(str(err).split()) or type(err).__name__
            raise CheckpointError(f"the chat template in {str(folder)!r} fails: {reason}. Leave out --chat.") from err
        ids = tokenize(tokenizer, wrapped)  # a template writes the special tokens itself
    if not ids:
        raise UsageError(f"the tokenizer in {str(folder)!r} makes no tokens of the prompt. Give more text.")
    return ids


def _write(model: Any, tokenizer: Any, prompt: list[int], how: _Sampling, on_piece: OnText) -> dict[str, Any]:
    """The fields of `Generation` that come from running `model`."""
    n_prompt, vocab = len(prompt), vocab_size(model)
    if (worst := max(prompt)) >= vocab:
        raise UsageError(f"token id {worst} is not in the vocabulary of {vocab}: the tokenizer is another model's.")
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if positions is not None and n_prompt > positions:
        raise UsageError(
            f"the prompt has {n_prompt} tokens, more than the {positions} positions of the model. Give a shorter one."
        )
    # The last token that is made is not read, so it needs no position.
    longest = how.max_new_tokens if positions is None else min(how.max_new_tokens, positions - n_prompt + 1)
    stopped = "length" if longest == how.max_new_tokens else "positions"
    ends = _end_tokens(model, tokenizer)
    generator = torch.Generator().manual_seed(how.seed)
    pieces, reader = _Pieces(tokenizer, prompt), CachedReader(model)
    seconds: list[float] = []
    token_ids, text = torch.tensor([prompt]), ""
    for _ in range(longest):
        start = time.perf_counter()
        token = _choose(reader.read(token_ids)[0], how, generator)
        seconds.append(time.perf_counter() - start)
        if token in ends:
            stopped = "end"
            break
        piece = pieces.add(token)
        text += piece
        on_piece(piece)
        token_ids = torch.tensor([[token]])
    rest = pieces.rest()
    on_piece(rest)
    return {
        "text": text + rest,
        "n_prompt_tokens": n_prompt,
        "n_new_tokens": len(seconds),
        "stopped": stopped,
        "prefill_tokens_per_second": n_prompt / seconds[0],
        "decode_tokens_per_second": (len(seconds) - 1) / sum(seconds[1:]) if len(seconds) > 1 else None,
    }


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = ends if isinstance(ends, list | tuple) else [ends]
    return {int(end) for end in (*listed, tokenizer.eos_token_id) if end is not None}


def _choose(logits: Tensor, how: _Sampling, generator: torch.Generator) -> int:
    """The next token by `logits` (vocab,)."""
    if how.temperature == 0:
        token = int(logits.argmax())  # NaN counts as the largest
        _check_finite(float(logits[token]))
        return token
    scaled = logits.float().cpu()
    _check_finite(float(scaled.max()))
    p = torch.softmax((scaled - scaled.max()) / how.temperature, dim=0)
    if how.top_p < 1:
        p, order = p.sort(descending=True)
        p = p.where(p.cumsum(0) - p < how.top_p, 0.0)
        return int(order[torch.multinomial(p, 1, generator=generator)])
    return int(torch.multinomial(p, 1, generator=generator))


def _check_finite(largest: float) -> None:
    if not math.isfinite(largest):
        raise NonFiniteError(
            f"the model's logits hold {largest}. Try --dtype float32, or check its weights with mendlm inspect."
        )


class _Pieces:
    """Text of token after token, whose pieces joined are the text of all of them.

    transformers' `TextStreamer` waits for whole words and decodes every line by itself, which loses the spaces that
    SentencePiece tokenizers drop from the start of what they decode. Here a few tokens before are decoded each time,
    and the text they have alone is taken off. A token that ends in the middle of a character waits for the next.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._before = prompt[-CONTEXT_TOKENS:]
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        self._waiting.append(token)
        piece = self._piece()
        if piece.endswith("\ufffd"):
            return ""
        if piece:
            self._before, self._waiting = self._waiting, []
        return piece

    def rest(self) -> str:
        return self._piece() if self._waiting else ""

    def _piece(self) -> str:
        before = self._decode(self._before)
        return self._decode(self._before + self._waiting)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
