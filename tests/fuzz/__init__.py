"""Bad input by the thousand: every reader is given damaged files in a child process, and only our own errors may come
out. ``python -m tests.fuzz --help``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # the seeds are written by what the tests beside this folder write
