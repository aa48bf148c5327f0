"""Have this process live by one of Windows' rules: no file that is open or mapped is removed or renamed.

On the path of a process (``PYTHONPATH``) this module is imported when Python starts. Linux alone.
"""

import os
import sys
from pathlib import Path

_REFUSED = {"os.remove", "os.rename", "os.rmdir"}


def _held():
    """Lines that end in the real paths of what this process has open or mapped."""
    held = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            held.append(f" {os.readlink(link)}\n")
        except OSError:  # closed meanwhile
            continue
    return "".join(held) + Path("/proc/self/maps").read_text()


def _refuse(event, arguments):
    if event not in _REFUSED:
        return
    for given in arguments[:2]:
        if isinstance(given, str | os.PathLike):
            path, held = os.path.realpath(given), _held()
            if f" {path}\n" in held or f" {path}{os.sep}" in held:
                raise PermissionError(13, "The process cannot access the file because it is being used", str(given))


sys.addaudithook(_refuse)
