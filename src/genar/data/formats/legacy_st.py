"""Legacy Spatial Transcriptomics: counts ``<id>.tsv(.gz)``, spots under tissue ``<id>_selection.tsv``, an image.

Counts have a row a spot, named ``10x21`` by its place in the array, and a column a gene. The selection has ``x``, ``y``
(array), ``new_x``, ``new_y`` (array, adjusted), ``pixel_x``, ``pixel_y`` (full-resolution px), ``selected``. Spots are
100 um wide, their centres 200 um apart. The files may lie in one folder or in subfolders, as in the HER2ST repository
(``ST-cnts/``, ``ST-spotfiles/``, ``ST-imgs/<patient>/<id>/<any name>.jpg``).
"""

import glob
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from genar.data import contract, reading
from genar.data.door import check_columns, door, open_text, reason_of
from genar.data.reading import ReadOptions
from genar.errors import InputError

NAME = "legacy_st"
EXPECTED = "legacy ST files (<id>.tsv.gz, <id>_selection.tsv, <id>.jpg)"
PITCH_UM, SPOT_UM = 200.0, 100.0
_SELECTION = "_selection.tsv"
_ROW = re.compile(r"\d{1,9}x\d{1,9}")
_COUNTS = (".tsv.gz", ".tsv", "_stdata.tsv.gz", "_stdata.tsv")


def sections(root: Path) -> list[str]:
    """Ids of the sections in ``root`` that have both counts and selection."""
    return [section for section, selection in _selections(root).items() if _counts_of(root, section, selection)]


def incomplete(root: Path) -> list[str]:
    """Sections of ``root`` whose spots are selected, but that have no counts."""
    found = _selections(root).items()
    return [f"{section} (no counts)" for section, selection in found if not _counts_of(root, section, selection)]


def image(root: Path, section: str, options: ReadOptions) -> Path | None:
    """The one that ``--image`` names, or that among the files."""
    return reading.named_image(section, options) or _image_of(root, section)


def read(root: Path, section: str, options: ReadOptions) -> AnnData:
    """Read one section as the contract has it."""
    selection = _selections(root)[section]
    counts = _counts_of(root, section, selection)
    assert counts is not None  # else it is none of sections()
    return read_files(counts, selection, image(root, section, options), section=section, options=options)


def read_files(
    counts: Path,
    selection: Path,
    image: Path | None = None,
    *,
    section: str,
    patient: str = "",
    options: ReadOptions | None = None,
) -> AnnData:
    """A section from its files, as the contract has it: selected spots that have counts, in the order of the counts.

    Spots are named ``010x021``. Selected spots without a row of counts are dropped and named in
    ``uns["genar"]["note"]``. Raises ``InputError`` where a file is not as described, no spot is left, or the section
    breaks the contract.
    """
    (spots, genes, values), places = _read_counts(Path(counts)), _read_selection(Path(selection))
    dropped = [name for name in places.index if name not in spots]
    kept = [name for name in spots if name in places.index]
    if not kept:
        raise InputError(f"{counts}: holds none of the {len(places)} spots of {selection}; are they a pair?")
    places = places.loc[kept]
    xy = places[["pixel_x", "pixel_y"]].to_numpy(float)
    array = places[["new_x", "new_y"] if {"new_x", "new_y"} <= set(places) else ["x", "y"]].to_numpy(float)
    obs = pd.DataFrame({"array_row": places["x"], "array_col": places["y"]}).astype(int)
    obs.index = [f"{row:03d}x{col:03d}" for row, col in obs.to_numpy()]
    row_of = {name: row for row, name in enumerate(spots)}
    adata = AnnData(sparse.csr_matrix(values[[row_of[name] for name in kept]]), obs=obs)
    adata.var_names = genes
    adata.obsm[contract.SPATIAL] = xy
    mpp, by = reading.pixel_size(
        section, options or ReadOptions(), pitch_mpp=PITCH_UM / reading.array_pitch_px(array, xy), slide=image
    )
    note = f"{len(dropped)} selected spots have no counts and are dropped: {', '.join(dropped)}" if dropped else ""
    return contract.new_section(
        adata,
        section=section,
        slide=image or "",
        mpp=mpp,
        spot_diameter_um=SPOT_UM,
        pitch_um=PITCH_UM,
        source=NAME,
        patient=patient,
        mpp_by=by,
        note=note,
    )


def _read_counts(path: Path) -> tuple[list[str], list[str], sparse.csr_matrix]:
    """Names of the spots as in the file, names of the genes, and the counts float32 [n, G]."""
    rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with door(path, "table", "expected tab-separated text, perhaps .gz"), open_text(path, share=1) as file:
        genes = file.readline().rstrip("\r\n").split("\t")[1:]
        for line in file:
            if line.strip():
                name, *cells = line.rstrip("\r\n").split("\t")
                if not _ROW.fullmatch(name):
                    raise InputError(f"{path}: expected rows named like 10x21, found {name[:60]!r}")
                if name in rows:
                    raise InputError(f"{path}: spot name {name!r} occurs more than once; make the spot names unique")
                rows[name] = _row_of_counts(path, name, cells, len(genes))
    if len(set(genes)) < len(genes):
        twice = Counter(genes).most_common(1)[0][0]
        raise InputError(f"{path}: gene name {twice!r} occurs more than once; make the gene names unique")
    starts = np.cumsum([0, *(len(places) for places, _ in rows.values())])
    places, values = (np.concatenate([part[i] for part in rows.values()]) if rows else np.empty(0) for i in (0, 1))
    counts = sparse.csr_matrix((values.astype(np.float32), places, starts), shape=(len(rows), len(genes)))
    return list(rows), genes, counts


def _row_of_counts(path: Path, spot: str, cells: list[str], n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """The genes of a spot that have counts, and the counts."""
    if len(cells) != n_genes:
        raise InputError(f"{path}: spot {spot} has {len(cells)} counts for {n_genes} genes; is it complete?")
    try:
        values = np.array(cells, dtype=np.float32)
    except ValueError as error:
        raise InputError(f"{path}: spot {spot}: {reason_of(error)}; expected a count in every cell") from error
    places = np.flatnonzero(values).astype(np.int32)
    return places, values[places]


def _read_selection(path: Path) -> pd.DataFrame:
    with door(path, "table", "expected tab-separated text"):
        check_columns(path, "\t")
        places = pd.read_csv(path, sep="\t")
    if missing := {"x", "y", "pixel_x", "pixel_y"} - set(places):
        raise InputError(f"{path}: expected columns x, y, pixel_x, pixel_y, found no {', '.join(sorted(missing))}")
    if "selected" in places:
        places = places.loc[places["selected"] != 0]
    try:
        if (places[["x", "y"]].astype(float) % 1 > 0).any(axis=None):
            raise ValueError("some are fractional")
        places.index = pd.Index([f"{int(x)}x{int(y)}" for x, y in zip(places["x"], places["y"], strict=True)])
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: columns x and y must be whole numbers ({error})") from error
    if twice := places.index[places.index.duplicated()].tolist():
        raise InputError(f"{path}: spot {twice[0]} is selected more than once; keep one row of it")
    return places


def _selections(root: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in (*root.glob(f"*{_SELECTION}"), *sorted(root.glob(f"*/*{_SELECTION}"))):
        if path.name.startswith("."):
            continue
        section = path.name.removesuffix(_SELECTION)
        if section in found:
            raise InputError(f"section {section}: two selections ({found[section]}, {path}); name one folder of them")
        found[section] = path
    return found


def _counts_of(root: Path, section: str, selection: Path) -> Path | None:
    """Those beside its selection, else in another folder."""
    beside = (path for suffix in _COUNTS if (path := selection.with_name(f"{section}{suffix}")).is_file())
    if (found := next(beside, None)) is not None:
        return found
    by_folder: dict[Path, Path] = {}
    for suffix in _COUNTS:
        for where in ("", "*/"):
            for path in sorted(root.glob(f"{where}{glob.escape(section)}{suffix}")):
                by_folder.setdefault(path.parent, path)
    if len(by_folder) > 1:
        one, other = list(by_folder.values())[:2]
        raise InputError(f"section {section}: two tables of counts ({one}, {other}); leave one of them there")
    return next(iter(by_folder.values()), None)


def _image_of(root: Path, section: str) -> Path | None:
    """The image called like the section, or the only one in a folder called like it."""
    suffixes, stem = reading.SLIDE_SUFFIXES, glob.escape(section)
    for depth in ("", "*/", "*/*/"):
        named = [p for p in root.glob(f"{depth}{stem}.*") if p.stem == section and p.suffix.lower() in suffixes]
        inside = [p for p in root.glob(f"{depth}{stem}/*") if p.suffix.lower() in suffixes and p.name[0] != "."]
        if len(found := named or inside) > 1:
            raise InputError(f"section {section}: {len(found)} images ({found[0]}, {found[1]}); name one with --image")
        if found:
            return found[0]
    return None
