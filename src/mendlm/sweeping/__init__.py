"""Sweeps: a grid of recipes, each compressed and evaluated in a process of its own, one record a point."""

from mendlm.sweeping._sweep import KEEP as KEEP
from mendlm.sweeping._sweep import PointDone as PointDone
from mendlm.sweeping._sweep import PointNote as PointNote
from mendlm.sweeping._sweep import PointStarted as PointStarted
from mendlm.sweeping._sweep import SweepEvent as SweepEvent
from mendlm.sweeping._sweep import SweepPlan as SweepPlan
from mendlm.sweeping._sweep import SweepResult as SweepResult
from mendlm.sweeping._sweep import plan_sweep as plan_sweep
from mendlm.sweeping._sweep import sweep as sweep
from mendlm.sweeping.grid import SweepSettings as SweepSettings
from mendlm.sweeping.records import SweepRecord as SweepRecord
from mendlm.sweeping.records import frontier as frontier
from mendlm.sweeping.records import read_sweep as read_sweep
