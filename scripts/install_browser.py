"""Installs Debian's Chromium and its driver, in which the tests open the page of `manualprop explain`.

`python3 scripts/run.py browser` calls it. It asks apt-get, by sudo where it must, and does nothing where they are there.
"""

import os
import shutil
import subprocess
import sys

NEEDED = {
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
}  # the program, and Debian's package of it


def main() -> int:
    missing = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if not missing:
        return 0
    if shutil.which("apt-get") is None:
        print(f"browser: this needs apt-get. Install {' and '.join(missing)} yourself.", file=sys.stderr)
        return 1
    apt = [*([] if os.getuid() == 0 else ["sudo"]), "apt-get", "-o", "Acquire::http::Timeout=20"]
    for step in (["update", "-q"], ["install", "-qy", *missing]):
        done = subprocess.run([*apt, *step], check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
