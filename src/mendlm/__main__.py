"""`python -m mendlm`: the same as the `mendlm` command."""

import sys

from mendlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
