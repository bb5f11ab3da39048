"""``python -m nextscale.cli``: the command line where its script is not on the path."""

import sys

from nextscale.cli import main

sys.exit(main())
