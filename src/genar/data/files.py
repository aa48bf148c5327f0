"""Write whole files or none: everything goes to a temporary name beside its place and is renamed into it. What a
killed process left under such a name goes when the file is written again."""

import contextlib
import errno
import glob
import hashlib
import os
import platform
import re
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from genar.errors import InputError

if TYPE_CHECKING:
    from filelock import FileLock

LOCK = ".lock"
MARK = "GenAR"
"""stands in files of GenAR's whose name alone tells nobody whose they are, so that others are not taken for them"""
_LONGEST_PART = 80  # bytes
_NO_FILE = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)
_REFUSALS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the quota is used up; free some space",
    errno.EFBIG: "the file may not grow so large here; raise the limit (ulimit -f), or choose another place",
    errno.EROFS: "it is read-only there; choose another place",
}


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` (a file or a folder); on success it becomes ``path``, otherwise it goes.

    The suffix is kept, as writers choose a format by it. Raises ``InputError`` where a file stands where the folder
    should be, the disk is full, or nothing may be written there; what ``path`` held before is then still there.
    """
    path = Path(path)
    temporary = _name_beside(path)
    try:
        _make_room(path)
        yield temporary
        if temporary.exists() and path.exists() and temporary.is_dir() != path.is_dir():
            made, found = ("folder", "file") if temporary.is_dir() else ("file", "folder")
            raise InputError(f"{path}: a {made} is to be written, and a {found} lies there; choose another place")
        _move(temporary, path)
    except (OSError, RuntimeError) as error:
        if told := refusal(error, path):
            raise told from error
        raise
    finally:
        _remove(temporary)


@contextlib.contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """A new folder on the disk of ``path``, gone at the end. Raises ``InputError`` as :func:`replacing`."""
    folder = _name_beside(path)
    _make_room(path)
    make_folder(folder)
    try:
        yield folder
    finally:
        _remove(folder)


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Keep a second process out of ``folder``, which is made, and goes again where nothing came into it. The lock ends
    with the process, however that ends.

    Raises ``InputError`` where ``what`` (a run, a bench) is at work there.
    """
    from filelock import FileLock, Timeout

    is_new = not folder.exists()
    make_folder(folder)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{folder}: another {what} is writing there; wait for it, or choose another --out") from None
    except OSError as error:
        if told := refusal(error, folder):
            raise told from error
        raise
    try:
        yield
    finally:
        let_go(lock)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def let_go(lock: "FileLock") -> None:
    """Release a lock and take its file away, in the order in which the system lets one do it.

    First the file: else another process may hold a lock that a third one, which finds no file, does not see. Windows
    removes no file that is open; there nobody can hold one that is gone.
    """
    path = Path(lock.lock_file)
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        lock.release()
        with contextlib.suppress(OSError):  # another process's by now
            path.unlink(missing_ok=True)
    else:
        lock.release()


def make_folder(folder: Path) -> None:
    """Make it with those above it. Raises ``InputError`` where a file is in the way, or the disk refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{folder}: expected a folder, found a file in its place; choose another place") from error
    except OSError as error:
        if told := refusal(error, folder):
            raise told from error
        raise


def refusal(error: BaseException, path: object) -> InputError | None:
    """What to tell the user where the system has no room for ``path``, or lets nobody write there; ``None`` where
    ``error`` says something else. Libraries put the system's words into an error of their own, or raise another one
    over it."""
    over: BaseException | None = error
    unknown = os.strerror(-1).lower()  # some systems have no words for a quota
    while over is not None:
        for number, advice in _REFUSALS.items():
            words = os.strerror(number).lower()
            says = words not in unknown and words in str(over).lower()
            if getattr(over, "errno", None) == number or says:
                return InputError(f"{path}: cannot be written: {advice}")
        over = over.__cause__ or over.__context__
    return None


def _make_room(path: Path) -> None:
    """Its folder, without what killed processes of this machine left there of ``path``."""
    make_folder(path.parent)
    if os.name != "posix":  # elsewhere one cannot ask whether a process lives without ending it
        return
    pattern = re.compile(rf"\.{re.escape(path.stem)}\.{_machine()}-(\d+)-\w+(\.old)?{re.escape(path.suffix)}")
    with os.scandir(path.parent) as entries:
        left = [(entry, found) for entry in entries if (found := pattern.fullmatch(entry.name))]
    for entry, found in left:
        if _is_alive(int(found[1])):
            continue
        if found[2] and not path.exists():  # killed between taking the old folder away and putting the new one there
            os.replace(entry.path, path)
        else:
            _remove(Path(entry.path))


def _move(temporary: Path, path: Path) -> None:
    if not (path.is_dir() and temporary.is_dir()):
        os.replace(temporary, path)
        return
    old = path.with_name(f"{temporary.name.removesuffix(path.suffix)}.old{path.suffix}")
    os.replace(path, old)  # no system puts a folder in the place of one that is not empty
    os.replace(temporary, path)
    _remove(old)


def _name_beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:6]}{path.suffix}")


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    with contextlib.suppress(NotADirectoryError):  # below a file there is nothing
        path.unlink(missing_ok=True)


def stores_of(section: str, store: Path) -> list[Path]:
    """The whole feature stores in the folder ``store`` whose name begins with this section's id: their attributes say
    whose they are."""
    return sorted(store.glob(f"{glob.escape(section)}-*.zarr"))


def drop_own(path: Path, beginning: str) -> None:
    """Delete the file at ``path`` where its head has the ``beginning`` of one of GenAR's: an earlier result that would
    be taken for a part of this one."""
    if path.is_file() and _begins_so(path, beginning):
        path.unlink()


def refuse_foreign(path: Path, beginning: str) -> None:
    """``InputError`` where a file lies at ``path`` whose head, 4 KiB, has not the ``beginning`` of one of GenAR's."""
    if path.is_file() and not _begins_so(path, beginning):
        raise InputError(f"{path}: is there already, and not of GenAR; choose another --out, or delete it first")


def _begins_so(path: Path, beginning: str) -> bool:
    with path.open("rb") as file:
        return beginning.encode() in file.read(1 << 12)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def file_part(name: str) -> str:
    """A name from a file as part of a file's name: as it is where every system takes it, else plain, with a hash.

    >>> file_part("HLA-A"), file_part("HLA-DRB3/4")
    ('HLA-A', 'HLA-DRB3-4-36d1d4d4')
    """
    if len(name.encode()) <= _LONGEST_PART and not _NO_FILE.search(name):
        return name
    return f"{plain(name)[:_LONGEST_PART]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def plain(name: str) -> str:
    """A name in letters, digits, points and hyphens; ``x`` where none is left.

    >>> plain("run/1 (old)")
    'run-1-old'
    """
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.") or "x"


def json_ready(value):
    """The value in JSON's own types: NaN, which JSON does not know, becomes null; paths become text."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and value != value else value
