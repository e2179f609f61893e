"""The tape-free step; see :class:`Backprop`."""

from manualprop._backprop._advice import NotFinite as NotFinite
from manualprop._backprop._advice import data_at_fault as data_at_fault
from manualprop._backprop._advice import not_finite as not_finite
from manualprop._backprop._programs import has_compiler as has_compiler
from manualprop._backprop._stages import WAY_OUT as WAY_OUT
from manualprop._backprop._step import Backprop as Backprop
from manualprop._backprop._trace import Record as Record
