"""Have this process live by one of Windows' rules: no file that is open or mapped is removed or renamed.

On the path of a process (``PYTHONPATH``) this module is imported when Python starts. Linux alone.
"""

import os
import sys
from pathlib import Path

_REFUSED = {"os.remove", "os.rename", "os.rmdir"}


def _held():
    """Real paths of what this process has open or mapped."""
    held = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            held.add(os.readlink(link))
        except OSError:  # closed meanwhile
            continue
    with open("/proc/self/maps") as maps:
        held.update(line.split(None, 5)[5].strip() for line in maps if line.count("/"))
    return held


def _refuse(event, arguments):
    if event not in _REFUSED:
        return
    for given in arguments[:2]:
        if isinstance(given, str | os.PathLike):
            path = os.path.realpath(given)
            if any(one == path or one.startswith(path + os.sep) for one in _held()):
                raise PermissionError(13, "The process cannot access the file because it is being used", str(given))


sys.addaudithook(_refuse)
