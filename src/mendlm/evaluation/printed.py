"""What ``mendlm eval --json`` printed, read again: for the report and for model cards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mendlm.errors import UsageError
from mendlm.paths import local_path

Protocol = tuple[str, Any, Any, Any]
"""Text (its SHA-256 where that is known), windows, their tokens, dtype: perplexities compare where this is the same."""


@dataclass(frozen=True)
class Evaluation:
    """A perplexity, and what says which one it is."""

    model: str
    text: str
    n_windows: int
    seqlen: int
    dtype: str
    ppl: float | None
    text_sha256: str | None = None

    @property
    def what(self) -> str:
        """The text and how much of it, in words."""
        return f"{self.text}, {self.n_windows} × {self.seqlen} tokens, {self.dtype}"

    @property
    def protocol(self) -> Protocol:
        """Perplexities compare where this is the same."""
        return (self.text_sha256 or self.text, self.n_windows, self.seqlen, self.dtype)


def read_evaluations(files: Iterable[str | Path]) -> tuple[Evaluation, ...]:
    """The perplexities in files that ``mendlm eval --json`` printed; one of several models or texts has several.

    Raises
    ------
    UsageError : a file is missing or something else.
    """
    found: list[Evaluation] = []
    for file in files:
        try:
            parsed = json.loads(local_path(file).read_text(encoding="utf-8"))
            rows = [evaluation_of(row) for row in _results(parsed)]
        except OSError as err:
            raise UsageError(f"cannot read {str(file)!r}: {err.strerror or err}.") from err
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as err:
            raise UsageError(f"{str(file)!r} is not what 'mendlm eval --json' prints ({err!r}).") from err
        if not rows:
            raise UsageError(
                f"{str(file)!r} holds no perplexity. Give what 'mendlm eval MODEL --text FILE --json' prints."
            )
        found += rows
    return tuple(dict.fromkeys(found))  # a reference comes with every model


def evaluation_of(row: Mapping[str, Any]) -> Evaluation:
    """The evaluation in one result of ``mendlm eval --json``; KeyError, TypeError or ValueError if it is none."""
    protocol = row["protocol"]
    sha256 = protocol.get("text_sha256")
    return Evaluation(
        model=str(protocol["model"]),
        text=Path(protocol["text"]).name,
        n_windows=int(row["n_windows"]),
        seqlen=int(row["seqlen"]),
        dtype=str(protocol["dtype"]),
        ppl=None if row["ppl"] is None else float(row["ppl"]),
        text_sha256=None if sha256 is None else str(sha256),
    )


def _results(parsed: Any) -> list[Mapping[str, Any]]:
    """The objects with a perplexity in a document, whatever lists they are in."""
    if isinstance(parsed, list):
        return [row for part in parsed for row in _results(part)]
    if not isinstance(parsed, dict):
        return []
    protocol = parsed.get("protocol")
    own = [parsed] if "ppl" in parsed and isinstance(protocol, dict) and {"model", "text"} <= set(protocol) else []
    return own + [row for part in parsed.values() if isinstance(part, list | dict) for row in _results(part)]
