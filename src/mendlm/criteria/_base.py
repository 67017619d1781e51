"""The interface of a criterion: what decides which entries of a weight stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mendlm.errors import NonFiniteError, UsageError
from mendlm.inputs import InputStats
from mendlm.linalg import all_finite
from mendlm.masks import mask_from_scores
from mendlm.patterns import Pattern, Scope

Needs = Literal["weights", "second_moment", "gram"]


@dataclass(frozen=True)
class Selection:
    """What a criterion chose.

    Attributes
    ----------
    mask : (d_out, d_in) bool, True = kept.
    S : (d_out, d_in), zero off the mask, float32 or float64: the weights of a criterion that also updates them
        (SparseGPT); None where they stay ``mask * W``.
    damping : what was added to the diagonal of a Gram matrix, as a share of its mean; None if none was used.
    """

    mask: Tensor
    S: Tensor | None = None
    damping: float | None = None


def statistics(inputs: InputStats | None) -> InputStats:
    """`inputs`, for criteria that cannot do without.

    Raises
    ------
    UsageError : there are none.
    """
    if inputs is None:
        raise UsageError("this criterion needs statistics of the inputs. Calibrate, or pass inputs=InputStats(...).")
    return inputs


class AbstractCriterion(ABC):
    """A rule that ranks the entries of a weight; the largest scores are kept.

    A subclass is a frozen dataclass whose fields are the hyperparameters. Most define `scores` alone; one that also
    updates the weights overrides `select`.

    Attributes
    ----------
    name : in `CRITERIA` and in recipes.
    needs : what it looks at beside W: "weights" (nothing), "second_moment" or "gram" of the inputs.
    default_scope : where weights compete under an unstructured pattern that does not say: as in the criterion's paper.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs] = "weights"
    default_scope: ClassVar[Scope] = "tensor"

    @abstractmethod
    def scores(self, W: Tensor, inputs: InputStats | None, generator: torch.Generator) -> Tensor:
        """Scores (d_out, d_in) of `W` (d_out, d_in), finite; `inputs` hold what `needs` says."""

    def select(self, W: Tensor, pattern: Pattern, inputs: InputStats | None, generator: torch.Generator) -> Selection:
        """The mask that `pattern` allows with the largest sum of scores."""
        scores = self.scores(W, inputs, generator)
        if scores.shape != W.shape:
            raise UsageError(
                f"criterion {self.name!r} returned scores of shape {tuple(scores.shape)} for W of shape "
                f"{tuple(W.shape)}."
            )
        if not all_finite(scores):
            raise NonFiniteError(f"criterion {self.name!r} returned NaN or infinite scores.")
        return Selection(mask_from_scores(scores, pattern))
