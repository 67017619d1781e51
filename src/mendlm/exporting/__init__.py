"""Other forms of a compressed folder: one file and one line of `LAYOUTS` for each."""

from mendlm.exporting._base import Layer as Layer
from mendlm.exporting._base import Layout as Layout
from mendlm.exporting._base import Stored as Stored
from mendlm.exporting._export import LAYOUTS as LAYOUTS
from mendlm.exporting._export import ExportResult as ExportResult
from mendlm.exporting._export import export as export
