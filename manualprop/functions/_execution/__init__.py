"""How a formula runs.  Nothing here knows any mathematics, and no rule knows any of this.

``_formula.py`` decides, ``_program.py`` makes the program for eager mode by the spellings of ``_lowering.py``,
``_kernels.py`` the compiled kernel.  ``_words.py`` has the few words that formulas use beside torch's;
``_normalisation.py`` and ``_classes.py`` have the kernels of ATen for values that are its own.
"""

from manualprop.functions._execution._formula import FORMULAS as FORMULAS
from manualprop.functions._execution._formula import HALF as HALF
from manualprop.functions._execution._formula import LARGE as LARGE
from manualprop.functions._execution._formula import Runner as Runner
from manualprop.functions._execution._formula import formula as formula
from manualprop.functions._execution._formula import full as full
from manualprop.functions._execution._formula import plain_eager as plain_eager
from manualprop.functions._execution._formula import read_legend as read_legend
from manualprop.functions._execution._formula import recorded as recorded
from manualprop.functions._execution._formula import watched as watched
from manualprop.functions._execution._words import chosen as chosen
from manualprop.functions._execution._words import decay as decay
from manualprop.functions._execution._words import erfc as erfc
from manualprop.functions._execution._words import indicator as indicator
from manualprop.functions._execution._words import inside as inside
from manualprop.functions._execution._words import less_on_class as less_on_class
from manualprop.functions._execution._words import of_class as of_class
from manualprop.functions._execution._words import on_class as on_class
from manualprop.functions._execution._words import weight_of as weight_of
