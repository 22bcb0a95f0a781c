"""The command line on a file system that shows a file at once or never, as no network's does."""

import sys


def dinoscale_on_local_files(words: list[str]) -> None:
    """`dinoscale WORDS`, to be forked; where a file is missing it does not wait for ten seconds."""
    from dinoscale import __main__
    from dinoscale.cluster.doctor import marker

    marker._SEEN_WITHIN_S = 1.0
    sys.argv = ["dinoscale", *words]
    __main__.main()
