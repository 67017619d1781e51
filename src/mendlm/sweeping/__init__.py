"""Sweeps: a grid of recipes, each compressed and evaluated in a process of its own, one record a point."""

from mendlm.sweeping.records import SweepRecord as SweepRecord
from mendlm.sweeping.records import frontier as frontier
from mendlm.sweeping.records import read_sweep as read_sweep
