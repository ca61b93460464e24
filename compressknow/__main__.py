"""`python -m compressknow`: the command line where the console script is not on the path."""

import sys

from compressknow.cli import main

if __name__ == "__main__":
    sys.exit(main())
