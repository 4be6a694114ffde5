"""The work: one room per concern, one `python -m components.<room>` command per stage."""

import os
import sys

if not sys.stderr.isatty():
    # A log is not a terminal: progress now and then instead of ten times a second. Read by tqdm when it is imported.
    os.environ.setdefault("TQDM_MININTERVAL", "15")
