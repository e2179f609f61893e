"""The steps of an update with the numbers of a real batch; see :func:`explain`."""

from manualprop._explain._explanation import Explanation as Explanation
from manualprop._explain._explanation import explain as explain
