"""Pruning criteria: which entries of a weight stay.

A new criterion is one file here and one line in `CRITERIA`; the contract tests then cover it.
"""

from mendlm.criteria._base import AbstractCriterion as AbstractCriterion
from mendlm.criteria._base import Needs as Needs
from mendlm.criteria._base import Selection as Selection
from mendlm.criteria.dsnot import DSnoT as DSnoT
from mendlm.criteria.ria import RIA as RIA
from mendlm.criteria.simple import Magnitude as Magnitude
from mendlm.criteria.simple import Random as Random
from mendlm.criteria.sparsegpt import SparseGPT as SparseGPT
from mendlm.criteria.wanda import Wanda as Wanda

CRITERIA: dict[str, type[AbstractCriterion]] = {
    kind.name: kind for kind in (Magnitude, Random, Wanda, RIA, DSnoT, SparseGPT)
}
