"""Fetch the paper's data sets into a folder in HEST-1k layout, from the hub or from the HER2ST authors' repository.

Every file is verified by size and hash before it appears under its name; what is there already is verified and kept;
an interrupted fetch goes on at the byte where it stopped. ``fetch.json`` in the folder says what came from where.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import genar
from genar.data.datasets import Dataset, dataset
from genar.data.files import alone, make_folder, write_text
from genar.data.progress import Bar, no_bar
from genar.errors import InputError
from genar.fetch import her2st, hub
from genar.fetch.transfer import RemoteFile, digest_of, download, matches, part_of

__all__ = ["SOURCES", "Fetched", "fetch_dataset"]

SOURCES = ("hub", "github")
RECORD = "fetch.json"
_PARTS = ".fetch"  # partial and raw files, removed when all is done
_SPARE_BYTES = 100 << 20
_CONVERTED = 3  # bytes of a converted section, and while it is made, for each byte of its raw files


@dataclass(frozen=True)
class Fetched:
    """What :func:`fetch_dataset` did."""

    folder: Path
    """The data set's, in HEST-1k layout."""
    sections: tuple[str, ...]
    """Ids of the sections that are there now."""
    revision: str
    """Commit of the source."""
    n_bytes: int
    """Bytes that came over the network."""
    n_files_new: int
    """Files that came."""
    n_files_kept: int
    """Files that were there already, verified."""


def fetch_dataset(
    name: str,
    out: str | Path,
    *,
    source: str = "hub",
    sections: Iterable[str] = (),
    revision: str | None = None,
    extras: Iterable[str] = (),
    say: Callable[[str], None] = print,
    bar: Bar = no_bar,
) -> Fetched:
    """Fetch the sections of the data set ``name`` (all of them, where none is given) into the folder ``out``.

    ``source`` is ``hub`` (HEST-1k) or ``github`` (her2st alone: the raw files, converted); ``revision`` a branch, tag
    or commit of it; ``extras`` kinds of further files (``hub.EXTRAS``). Raises ``InputError`` with one line where a
    name is unknown, the source refuses or is out of reach, bytes are not what the source's list says, the disk is too
    small, or ``out`` holds other files under the same names.
    """
    data, out, extras = dataset(name), Path(out), list(extras)
    if source not in SOURCES:
        raise InputError(f"source {source!r} is not known; expected one of {', '.join(SOURCES)}")
    if source == "github" and data.name != "her2st":
        raise InputError(f"{data.name}: its raw files are not on GitHub; fetch it from the hub (--source hub)")
    if source == "github" and extras:
        raise InputError(f"--with {extras[0]}: the authors' repository has none; fetch from the hub")
    ids = data.pick(sections)
    with _alone(out):
        task = _Task(data, ids, out, _Record(out, data, source), revision, extras, say, bar)
        done = _from_hub(task) if source == "hub" else _from_github(task)
        if set(ids) == set(data.sections):  # nothing is left to go on with
            for part in (out / _PARTS).glob("*.part"):
                part.unlink()
    return done


@dataclass(frozen=True)
class _Task:
    data: Dataset
    ids: tuple[str, ...]
    out: Path
    record: "_Record"
    revision: str | None
    extras: list[str]
    say: Callable[[str], None]
    bar: Bar

    @property
    def parts(self) -> Path:
        return self.out / _PARTS


def _from_hub(task: _Task) -> Fetched:
    listing, record = hub.list_files(task.ids, task.revision, task.extras), task.record
    record.start(hub.REPOSITORY, listing.commit, hub.LICENCE)
    task.say(f"{task.data.name}: {len(task.ids)} sections of HEST-1k ({hub.PAGE} at {listing.commit[:8]})")
    task.say(f"Licence: {hub.LICENCE}. To be let in, {hub.TERMS}.")
    coming = []
    for file in listing.files:
        if record.is_there(file):
            record.add(file.path, file.size, file.digest)
        else:
            coming.append(file)
    n_kept = len(listing.files) - len(coming)
    n_bytes = _tell_size(task, coming, n_kept)
    with _progress(task, coming) as tick:
        for file in coming:
            download(file, task.out / file.path, parts=task.parts, access=listing.access, tick=tick)
            record.add(file.path, file.size, file.digest)
            record.write()
    record.write()
    return Fetched(task.out, task.ids, listing.commit, n_bytes, len(coming), n_kept)


def _from_github(task: _Task) -> Fetched:
    files, access = her2st.list_files(task.ids, task.revision)
    commit, raw, record = task.revision or her2st.DEFAULT_REVISION, task.parts / "raw", task.record
    record.start(her2st.REPOSITORY, commit, her2st.LICENCE)
    task.say(f"{task.data.name}: raw files of {len(task.ids)} sections ({her2st.PAGE} at {commit[:8]})")
    task.say(f"Licence: {her2st.LICENCE}. They will be converted to HEST-1k layout.")
    absent = {section: files[section] for section in task.ids if not record.is_converted(section, files[section])}
    coming = [file for needed in absent.values() for file in needed if not matches(raw / file.path, file)]
    n_kept = sum(len(her2st.outputs(section)) for section in task.ids if section not in absent)
    room = _CONVERTED * sum(file.size for needed in absent.values() for file in needed)
    n_bytes = _tell_size(task, coming, n_kept, room)
    with _progress(task, coming) as tick:
        for section, needed in absent.items():
            for file in needed:
                if file in coming:
                    download(file, raw / file.path, parts=task.parts, access=access, tick=tick)
            _convert(task, section, needed)
    record.write()
    return Fetched(task.out, task.ids, commit, n_bytes, sum(len(her2st.outputs(s)) for s in absent), n_kept)


def _convert(task: _Task, section: str, raw_files: list[RemoteFile]) -> None:
    """Convert aside, record, then rename into place: at any moment what lies there is known to be ours."""
    raw, made = task.parts / "raw", task.parts / "made"
    paths = her2st.convert(raw, section, made)
    for path in paths:
        task.record.add(path, (made / path).stat().st_size, digest_of(made / path), made_from=raw_files)
    task.record.write()
    for path in paths:
        (task.out / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / path, task.out / path)
    for file in raw_files:
        (raw / file.path).unlink()


class _Record:
    """``fetch.json``: what was fetched into a folder, from where, with which hashes."""

    def __init__(self, out: Path, data: Dataset, source: str):
        self.path, self.out = out / RECORD, out
        self.facts = {"dataset": data.name, "source": source}
        self.files: dict[str, dict] = {}
        if not self.path.is_file():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            other = {key: found[key] for key in self.facts}
            self.files = dict(found["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path}: not the record of a fetch ({error!r}); choose another folder") from error
        if other != self.facts:
            raise InputError(
                f"{out}: holds {other['dataset']} from source {other['source']}, asked for {data.name} from {source}; "
                "choose another folder"
            )

    def start(self, repository: str, revision: str, licence: str) -> None:
        self.facts |= {"repository": repository, "revision": revision, "licence": licence}

    def add(self, path: str, size: int, digest: str, made_from: Iterable[RemoteFile] = ()) -> None:
        self.files[path] = {"size": size, "digest": digest, "revision": self.facts["revision"]}
        if made_from:
            self.files[path]["made_from"] = {file.path: file.digest for file in made_from}

    def is_there(self, file: RemoteFile) -> bool:
        """Whether ``file`` is there, verified. An older revision's, as it was fetched, counts as absent.

        Raises ``InputError`` where something else lies there: it is the user's, and not for us to replace.
        """
        path = self.out / file.path
        if not path.is_file():
            return False
        if matches(path, file):
            return True
        self._refuse_unless_ours(file.path)
        return False

    def is_converted(self, section: str, raw: Iterable[RemoteFile]) -> bool:
        """Whether the section is there, as it was made from these very raw files. Raises as :meth:`is_there`."""
        paths = her2st.outputs(section)
        there = [path for path in paths if (self.out / path).is_file()]
        for path in there:
            self._refuse_unless_ours(path)
        wanted = {file.path: file.digest for file in raw}
        return there == paths and all(self.files[path].get("made_from") == wanted for path in paths)

    def _refuse_unless_ours(self, path: str) -> None:
        ours = self.files.get(path)
        if ours is None or digest_of(self.out / path, ours["digest"].partition(":")[0]) != ours["digest"]:
            raise InputError(
                f"{self.out / path}: there already, but not as fetched (other size or hash); move it away or choose "
                "another folder"
            )

    def write(self) -> None:
        facts = {**self.facts, "genar": genar.__version__, "files": dict(sorted(self.files.items()))}
        write_text(self.path, json.dumps(facts, indent=2) + "\n")


def _tell_size(task: _Task, coming: list[RemoteFile], n_kept: int, room: int = 0) -> int:
    """Say and return how many bytes will come; refuse where the disk cannot hold them and ``room`` bytes more."""
    begun = _begun(task, coming)
    total = sum(file.size for file in coming)
    here = f", {_human(begun)} of them here already" if begun else ""
    task.say(f"{len(coming)} files to come, {_human(total)}{here}; {n_kept} files are here, verified")
    free = shutil.disk_usage(task.out).free
    if coming and (needed := total - begun + room + _SPARE_BYTES) > free:
        raise InputError(
            f"{task.out}: {_human(needed)} needed, {_human(free)} free; free some space, or fetch fewer sections "
            "(--sections)"
        )
    return total - begun


@contextmanager
def _progress(task: _Task, coming: list[RemoteFile]):
    """A bar over all bytes; yields what to tell of every so many bytes more."""
    done, total = _begun(task, coming), sum(file.size for file in coming)
    with task.bar(task.data.name, total) as show:

        def tick(more: int) -> None:
            nonlocal done
            done += more
            show(done, total)

        tick(0)
        yield tick


def _begun(task: _Task, coming: list[RemoteFile]) -> int:
    """Bytes that earlier, broken transfers left."""
    parts = (part_of(file, task.parts) for file in coming)
    return sum(part.stat().st_size for part in parts if part.is_file())


@contextmanager
def _alone(out: Path):
    """Keep a second fetch out of the same folder; at the end a folder of parts without any goes."""
    with alone(out, "fetch"):
        parts = out / _PARTS
        make_folder(parts)
        try:
            yield
        finally:
            if not any(path.is_file() for path in parts.rglob("*")):
                shutil.rmtree(parts, ignore_errors=True)


def _human(n_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
