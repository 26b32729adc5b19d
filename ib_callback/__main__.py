"""`python -m ib_callback`: the same as `ib-callback`."""

import sys

from ib_callback.cli.main import main

sys.exit(main())
