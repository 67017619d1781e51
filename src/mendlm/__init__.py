"""mendlm: compress pretrained language models as sparse + low-rank, W ≈ S + B @ A, without retraining."""

from typing import TYPE_CHECKING, Any

from mendlm._import_hook import install as _install
from mendlm._lazy import resolve as _resolve
from mendlm.errors import MendError as MendError

__version__ = "0.1.0"

_install()

# Public name -> module, imported on first use (PEP 562): torch takes a second to import, transformers several.
_LAZY = {
    "AcceleratedTLR": "mendlm.refiners",
    "BudgetPlan": "mendlm.budget_planning",
    "BenchResult": "mendlm.speed",
    "Comparison": "mendlm.evaluation.comparison",
    "CompressionResult": "mendlm.pipeline",
    "NM": "mendlm.patterns",
    "OATS": "mendlm.refiners",
    "PCP": "mendlm.refiners",
    "PairedDifference": "mendlm.evaluation.comparison",
    "PerplexityResult": "mendlm.evaluation.perplexity",
    "PruneOnly": "mendlm.refiners",
    "EoRA": "mendlm.refiners",
    "HassleFree": "mendlm.refiners",
    "JointADMM": "mendlm.refiners",
    "Generation": "mendlm.generation",
    "InputStats": "mendlm.inputs",
    "Recipe": "mendlm.config",
    "Refinement": "mendlm.refiners",
    "SLiMLoRA": "mendlm.refiners",
    "SparseLowRank": "mendlm.decomposition",
    "SparseLowRankLinear": "mendlm.runtime",
    "TLR": "mendlm.refiners",
    "Tiles": "mendlm.patterns",
    "Unstructured": "mendlm.patterns",
    "ZeroShotSVD": "mendlm.refiners",
    "ExportResult": "mendlm.exporting",
    "bench": "mendlm.speed",
    "compare": "mendlm.evaluation.comparison",
    "compress": "mendlm.pipeline",
    "export": "mendlm.exporting",
    "generate": "mendlm.generation",
    "import_gguf": "mendlm.gguf",
    "load": "mendlm.loading",
    "paired_difference": "mendlm.evaluation.comparison",
    "plan_budget": "mendlm.budget_planning",
    "perplexity": "mendlm.evaluation.perplexity",
    "refine": "mendlm.refiners",
    "ReportResult": "mendlm.report",
    "report": "mendlm.report",
    "select_mask": "mendlm.selection",
    "Verification": "mendlm.verifying",
    "verify": "mendlm.verifying",
    "SweepRecord": "mendlm.sweeping",
    "SweepResult": "mendlm.sweeping",
    "sweep": "mendlm.sweeping",
}
__all__ = ["MendError", *_LAZY]

if TYPE_CHECKING:
    from mendlm.budget_planning import BudgetPlan as BudgetPlan
    from mendlm.budget_planning import plan_budget as plan_budget
    from mendlm.config import Recipe as Recipe
    from mendlm.decomposition import SparseLowRank as SparseLowRank
    from mendlm.evaluation.comparison import Comparison as Comparison
    from mendlm.evaluation.comparison import PairedDifference as PairedDifference
    from mendlm.evaluation.comparison import compare as compare
    from mendlm.evaluation.comparison import paired_difference as paired_difference
    from mendlm.evaluation.perplexity import PerplexityResult as PerplexityResult
    from mendlm.evaluation.perplexity import perplexity as perplexity
    from mendlm.exporting import ExportResult as ExportResult
    from mendlm.exporting import export as export
    from mendlm.generation import Generation as Generation
    from mendlm.generation import generate as generate
    from mendlm.gguf import import_gguf as import_gguf
    from mendlm.inputs import InputStats as InputStats
    from mendlm.loading import load as load
    from mendlm.patterns import NM as NM
    from mendlm.patterns import Tiles as Tiles
    from mendlm.patterns import Unstructured as Unstructured
    from mendlm.pipeline import CompressionResult as CompressionResult
    from mendlm.pipeline import compress as compress
    from mendlm.refiners import OATS as OATS
    from mendlm.refiners import PCP as PCP
    from mendlm.refiners import TLR as TLR
    from mendlm.refiners import AcceleratedTLR as AcceleratedTLR
    from mendlm.refiners import EoRA as EoRA
    from mendlm.refiners import HassleFree as HassleFree
    from mendlm.refiners import JointADMM as JointADMM
    from mendlm.refiners import PruneOnly as PruneOnly
    from mendlm.refiners import Refinement as Refinement
    from mendlm.refiners import SLiMLoRA as SLiMLoRA
    from mendlm.refiners import ZeroShotSVD as ZeroShotSVD
    from mendlm.refiners import refine as refine
    from mendlm.report import ReportResult as ReportResult
    from mendlm.report import report as report
    from mendlm.runtime import SparseLowRankLinear as SparseLowRankLinear
    from mendlm.selection import select_mask as select_mask
    from mendlm.speed import BenchResult as BenchResult
    from mendlm.speed import bench as bench
    from mendlm.sweeping import SweepRecord as SweepRecord
    from mendlm.sweeping import SweepResult as SweepResult
    from mendlm.sweeping import sweep as sweep
    from mendlm.verifying import Verification as Verification
    from mendlm.verifying import verify as verify


def __getattr__(name: str) -> Any:
    return _resolve(_LAZY, __name__, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
