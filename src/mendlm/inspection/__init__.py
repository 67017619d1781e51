"""What is in a checkpoint, dense or packed: a table from headers and records alone, and the spectrum of one weight."""

from mendlm.inspection._spectrum import Spectrum as Spectrum
from mendlm.inspection._spectrum import energy_frac as energy_frac
from mendlm.inspection._spectrum import packed_spectrum as packed_spectrum
from mendlm.inspection._spectrum import singular_values as singular_values
from mendlm.inspection._spectrum import tensor_spectrum as tensor_spectrum
from mendlm.inspection._table import InspectedTensor as InspectedTensor
from mendlm.inspection._table import Inspection as Inspection
from mendlm.inspection._table import inspect as inspect
