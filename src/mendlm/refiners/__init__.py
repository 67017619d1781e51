"""Refiners: algorithms that find the low-rank part for a given mask.

A new refiner is one file here and one line in `REFINERS`; the contract tests then cover it.
"""

from mendlm.refiners._base import AbstractRefiner as AbstractRefiner
from mendlm.refiners._base import Problem as Problem
from mendlm.refiners._base import Progress as Progress
from mendlm.refiners._base import StackRefiner as StackRefiner
from mendlm.refiners._loop import Refinement as Refinement
from mendlm.refiners._loop import check_rank as check_rank
from mendlm.refiners._loop import refine as refine
from mendlm.refiners._loop import refine_stack as refine_stack
from mendlm.refiners.accelerated import AcceleratedTLR as AcceleratedTLR
from mendlm.refiners.eora import EoRA as EoRA
from mendlm.refiners.hassle_free import HassleFree as HassleFree
from mendlm.refiners.joint import JointADMM as JointADMM
from mendlm.refiners.oats import OATS as OATS
from mendlm.refiners.pcp import PCP as PCP
from mendlm.refiners.slim_lora import SLiMLoRA as SLiMLoRA
from mendlm.refiners.tlr import TLR as TLR
from mendlm.refiners.zero_shot import PruneOnly as PruneOnly
from mendlm.refiners.zero_shot import ZeroShotSVD as ZeroShotSVD

REFINERS: dict[str, type[AbstractRefiner]] = {
    cls.name: cls
    for cls in (TLR, AcceleratedTLR, JointADMM, ZeroShotSVD, PCP, OATS, HassleFree, EoRA, SLiMLoRA, PruneOnly)
}
