"""Give the layers of an existing model their hand-derived twins, and take them back."""

from manualprop._swap._replace import swap as swap
from manualprop._swap._replace import unswap as unswap
from manualprop._swap._report import Report as Report
from manualprop._swap._report import Row as Row
from manualprop._swap._twins import TWINS as TWINS
