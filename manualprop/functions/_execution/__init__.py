"""How a formula runs.  Nothing here knows the mathematics of a rule, and no rule knows how it runs.

``_formula.py`` decides.  ``_program.py`` makes the program for eager mode, with the faster forms of
``_lowering.py``; ``_kernels.py`` makes the compiled kernel.  ``_words.py`` has the few functions that
formulas use in addition to torch's.  ``_normalisation.py`` and ``_classes.py`` call the ATen kernels that
compute a value directly.
"""

from manualprop.functions._execution._classes import kernel as kernel
from manualprop.functions._execution._formula import FORMULAS as FORMULAS
from manualprop.functions._execution._formula import HALF as HALF
from manualprop.functions._execution._formula import LARGE as LARGE
from manualprop.functions._execution._formula import Runner as Runner
from manualprop.functions._execution._formula import eagerly as eagerly
from manualprop.functions._execution._formula import formula as formula
from manualprop.functions._execution._formula import full as full
from manualprop.functions._execution._formula import plain_eager as plain_eager
from manualprop.functions._execution._formula import read_legend as read_legend
from manualprop.functions._execution._formula import recorded as recorded
from manualprop.functions._execution._formula import watched as watched
from manualprop.functions._execution._formula import written_over as written_over
from manualprop.functions._execution._words import chosen as chosen
from manualprop.functions._execution._words import decay as decay
from manualprop.functions._execution._words import erfc as erfc
from manualprop.functions._execution._words import indicator as indicator
from manualprop.functions._execution._words import inside as inside
from manualprop.functions._execution._words import less_on_class as less_on_class
from manualprop.functions._execution._words import of_class as of_class
from manualprop.functions._execution._words import on_class as on_class
from manualprop.functions._execution._words import weight_of as weight_of
