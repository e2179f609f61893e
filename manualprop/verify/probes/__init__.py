"""The probes, by family: importing this enters them all into the registry."""

from manualprop.verify._probe import PROBES, Probe

# In the order in which they run.
from manualprop.verify.probes import derivatives as derivatives  # isort: skip
from manualprop.verify.probes import arguments as arguments  # isort: skip
from manualprop.verify.probes import layouts as layouts  # isort: skip
from manualprop.verify.probes import sizes as sizes  # isort: skip
from manualprop.verify.probes import ranks as ranks  # isort: skip
from manualprop.verify.probes import dtypes as dtypes  # isort: skip
from manualprop.verify.probes import extremes as extremes  # isort: skip
from manualprop.verify.probes import ties as ties  # isort: skip
from manualprop.verify.probes import state as state  # isort: skip
from manualprop.verify.probes import calls as calls  # isort: skip
from manualprop.verify.probes import memory as memory  # isort: skip
from manualprop.verify.probes import routes as routes  # isort: skip
from manualprop.verify.probes import compiled as compiled  # isort: skip


def load() -> dict[str, Probe]:
    """Every probe, in the order in which they run."""
    return PROBES
