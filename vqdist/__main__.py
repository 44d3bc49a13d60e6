"""`python -m vqdist`: the same as the `vqdist` command."""

import sys

from vqdist.cli import main

sys.exit(main())
