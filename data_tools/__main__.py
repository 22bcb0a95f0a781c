"""`python -m data_tools TOOL ...` is `dinoscale data TOOL ...`."""

import sys

from dinoscale.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["data"]
    main()
