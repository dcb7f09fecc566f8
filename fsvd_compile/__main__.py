"""`python -m fsvd_compile` is `fsvd-compile`."""

import sys

from fsvd_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
