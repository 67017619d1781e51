"""What the folders of finished runs say about themselves, and perplexities that belong to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mendlm.budgets import stored_frac
from mendlm.errors import CheckpointError, UsageError
from mendlm.evaluation.printed import Evaluation
from mendlm.report.records import RUN_FILE, Manifest, TensorRecord, parse_json, read_manifest


@dataclass(frozen=True)
class Run:
    """One compressed folder.

    Attributes
    ----------
    label : its name, with as much of the path before it as sets it apart from the others.
    folder : where it is.
    manifest : `mendlm.json`.
    facts : `mendlm.run.json`: what differs from run to run; empty without that file.
    evaluations : perplexities of this model.
    """

    label: str
    folder: Path
    manifest: Manifest
    facts: Mapping[str, Any]
    evaluations: tuple[Evaluation, ...] = ()

    @cached_property
    def rel_error(self) -> float:
        """Root mean square of the relative errors of the compressed tensors."""
        squares = [record.rel_error**2 for record in self.manifest.records]
        return math.sqrt(math.fsum(squares) / max(len(squares), 1))

    @cached_property
    def worst(self) -> TensorRecord | None:
        """The record with the largest relative error."""
        return max(self.manifest.records, key=lambda record: record.rel_error, default=None)

    @cached_property
    def sparsity(self) -> float:
        """Share of zeros in S, over all compressed tensors."""
        entries = sum(record.shape[0] * record.shape[1] for record in self.manifest.records)
        return 1 - stored_frac(sum(record.n_kept for record in self.manifest.records), entries)

    @property
    def ranks(self) -> tuple[int, int]:
        """The smallest and the largest rank."""
        ranks = [record.rank for record in self.manifest.records] or [0]
        return min(ranks), max(ranks)

    def number(self, name: str) -> float | None:
        """A figure of `facts`; None if it is not known."""
        value = self.facts.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def read_runs(folders: Sequence[Path]) -> tuple[Run, ...]:
    """The runs in `folders`, each under a label of its own.

    Raises
    ------
    UsageError : a folder was not written by mendlm compress, or is given twice.
    CheckpointError : its `mendlm.json` or `mendlm.run.json` is damaged.
    """
    paths = [folder.absolute() for folder in folders]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UsageError(f"{str(folders[i])!r} is given twice. Name every folder once.")
    labels = _labels(paths)
    return tuple(
        Run(label, folder, read_manifest(folder), _run_facts(folder))
        for label, folder in zip(labels, folders, strict=True)
    )


def same_model(evaluation: Evaluation, folder: Path) -> bool:
    """Whether an evaluation is of the model in `folder`: by its path, or by its name if that path is not here."""
    path = Path(evaluation.model)
    if path.exists():
        return path.resolve() == folder.resolve()
    return path.name == folder.absolute().name


def _labels(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as set them apart."""
    depth = 1
    while True:
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels) or depth > max(len(path.parts) for path in paths):
            return labels
        depth += 1


def _run_facts(folder: Path) -> Mapping[str, Any]:
    path = folder / RUN_FILE
    try:
        parsed = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as err:
        raise CheckpointError(f"cannot read {str(path)!r}: {err.strerror or err}.") from err
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{str(path)!r} is not valid JSON: {err}. Delete it: it holds times alone.") from err
    return parsed if isinstance(parsed, dict) else {}
