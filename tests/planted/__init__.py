"""Functions with a planted defect, and right ones of the same variety: what ``manualprop.verify`` is judged by."""

from planted import (
    controls_alarms,
    controls_functions,
    controls_layers,
    controls_structures,
    controls_torch,
    defects_arguments,
    defects_batches,
    defects_extremes,
    defects_first_order,
    defects_in_pairs,
    defects_layers,
    defects_memory,
    defects_numbers,
    defects_routes,
    defects_state,
    library,
    library_models,
    twins_arrays,
    twins_kernels,
    twins_library,
    twins_numbers,
    twins_sequences,
    twins_shapes,
    twins_state,
)
from planted._table import CONTROLS as CONTROLS
from planted._table import DEFECTS as DEFECTS
from planted._table import Call as Call
from planted._table import Control as Control
from planted._table import Defect as Defect

FAMILIES = (
    controls_alarms,
    controls_functions,
    controls_layers,
    controls_structures,
    controls_torch,
    defects_arguments,
    defects_batches,
    defects_extremes,
    defects_first_order,
    defects_in_pairs,
    defects_layers,
    defects_memory,
    defects_numbers,
    defects_routes,
    defects_state,
    library,
    library_models,
    twins_arrays,
    twins_kernels,
    twins_library,
    twins_numbers,
    twins_sequences,
    twins_shapes,
    twins_state,
)
