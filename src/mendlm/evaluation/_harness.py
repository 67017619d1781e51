"""The lm-evaluation-harness's view of a transformers model, with answers kept, and the harness without its noise.

Imports the harness: only for functions that need it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import datasets
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from mendlm._quiet import quiet_transformers
from mendlm.errors import NonFiniteError
from mendlm.evaluation._answers import AnswerStore, key_of

Progress = Callable[[str, int, int], None]
"""Called with (model, requests answered, requests known of so far)."""


class LanguageModel(HFLM):  # type: ignore[misc]
    """Answers requests as `HFLM` does, but for those that `store` holds already.

    Parameters
    ----------
    folder, model, tokenizer : a transformers causal LM, and where it comes from.
    batch_size : requests at a time.
    how : facts about the run, for the report.
    store : of answers; None keeps none.
    progress : called after each request.
    """

    def __init__(
        self,
        folder: str,
        model: Any,
        tokenizer: Any,
        batch_size: int,
        how: dict[str, Any],
        store: AnswerStore | None,
        progress: Progress | None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.folder, self.store, self._progress, self.how = folder, store, progress, how
        self.n_requests = self._done = self.n_computed = 0
        self._unsaved: set[str] = set()
        self.set_cache_hook(self)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._answer("loglikelihood", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        # The harness tells of the whole list when all of it is done: one text after the other can be kept.
        def one_by_one(some: list[Any], disable_tqdm: bool) -> list[Any]:
            compute = super(LanguageModel, self).loglikelihood_rolling
            return [compute([request], disable_tqdm=disable_tqdm)[0] for request in some]

        return self._answer("loglikelihood_rolling", requests, one_by_one)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._answer("generate_until", requests, super().generate_until)

    def _answer(self, kind: str, requests: list[Any], compute: Callable[..., list[Any]]) -> list[Any]:
        self.n_requests += len(requests)
        keys = [key_of(kind, request.args) for request in requests]
        # What is drawn at random is not kept: several draws of one request must differ.
        drawn = {
            k for k, r in zip(keys, requests, strict=True) if kind == "generate_until" and r.args[1].get("do_sample")
        }
        self._unsaved |= drawn
        kept = {} if self.store is None else self.store.answers(kind, set(keys) - drawn)
        left = [i for i, key in enumerate(keys) if key not in kept]
        self._advance(len(requests) - len(left))
        answers: list[Any] = [kept.get(key) for key in keys]
        computed = compute([requests[i] for i in left], disable_tqdm=True) if left else []
        for i, answer in zip(left, computed, strict=True):
            answers[i] = answer
        self.n_computed += len(left)
        return answers

    def add_partial(self, kind: str, args: Any, answer: Any) -> None:
        """The harness's hook: called with each request that is answered, as soon as its batch is."""
        number = answer if kind == "loglikelihood_rolling" else answer[0] if kind == "loglikelihood" else 0.0
        if math.isnan(number):
            raise NonFiniteError(
                f"{self.folder!r} gives NaN as the log-likelihood of {str(args[-1])[:80]!r}: its logits hold NaN "
                "or infinity. Try --dtype float32, or check its weights."
            )
        key = key_of(kind, args)
        if self.store is not None and key not in self._unsaved:
            self.store.keep(key, kind, answer)
        self._advance(1)

    def _advance(self, n: int) -> None:
        self._done += n
        if self._progress is not None and n:
            self._progress(self.folder, self._done, self.n_requests)


def printing_to(stdout: TextIO, progress: Progress) -> Progress:
    """`progress`, free to print while the harness is not."""

    def heard(model: str, done: int, total: int) -> None:
        with contextlib.redirect_stdout(stdout):
            progress(model, done, total)

    return heard


@contextlib.contextmanager
def quiet_harness() -> Iterator[TextIO]:
    """The harness, datasets and transformers without log lines, bars and prints; everything is put back afterwards.

    Yields stdout as it is outside.
    """
    stdout = sys.stdout
    bar: Any = importlib.import_module("tqdm.std").tqdm
    original, stored = bar.__init__, vars(bar)["__init__"]
    describers = (evaluator.add_env_info, evaluator.get_git_commit_hash)

    @functools.wraps(original)
    def silent(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **(options | {"disable": True}))

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    try:
        with quiet_transformers(), contextlib.redirect_stdout(io.StringIO()):
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            bar.__init__ = silent
            # They start a dozen programs, git aloud, to describe the machine in fields that nothing here uses.
            evaluator.add_env_info, evaluator.get_git_commit_hash = (lambda results: None), (lambda: None)
            datasets.disable_progress_bars()
            yield stdout
    finally:
        bar.__init__ = stored
        evaluator.add_env_info, evaluator.get_git_commit_hash = describers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
