"""``python -m trackformer_sb``: the ``trackformer`` command."""

import sys

from trackformer_sb.cli import main

if __name__ == "__main__":
    sys.exit(main())
