"""`python -m manualprop`: the console command, where the environment's folder of commands is not on the PATH."""

import sys

from manualprop._command import main

sys.exit(main())
