"""What ``genar check`` says of sections and slides, before hours are spent on them. Loads neither torch nor a whole
image."""

import hashlib
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from genar.data import SectionRef, contract, find_sections, options_for
from genar.data.door import check_zarr, door
from genar.data.files import stores_of
from genar.data.formats import used_by
from genar.data.reading import ReadOptions, disagreeing
from genar.data.slide import image_head
from genar.data.tissue import on_tissue, tissue_of
from genar.errors import InputError, NoRawCountsError, SectionWarning
from genar.genes import Panel
from genar.report import maps

_OF_A_GENOME = re.compile(r"^(GRC[hm]\d+|hg\d+|mm\d+)_+")  # where reads were aligned to several
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}(\.\d+)?")
_SHARE = 0.8  # of the names that must be alike to be called a kind
_FEW_ON_TISSUE = 0.5


@dataclass
class SectionReport:
    """One row of ``genar check``; what could not be read is ``None``."""

    section: str
    """its id"""
    path: str
    """the folder it lies in"""
    format: str
    """as ``genar.data.formats`` names it, or ``simulated``"""
    n_spots: int | None = None
    """all, those without counts too"""
    n_genes: int | None = None
    """0 of a bare slide"""
    n_empty: int | None = None
    """spots without counts"""
    library_size: dict[str, float] | None = None
    """least, median and greatest"""
    raw_counts: bool | None = None
    """whether the counts are raw; ``False`` where they were refused"""
    counts_from: str = ""
    """``X``, or the layer that they were found in"""
    mpp: float | None = None
    """pixel size that is used, um per px"""
    mpp_by: dict[str, float] = field(default_factory=dict)
    """pixel size by ``metadata``, ``pitch`` and ``image``"""
    mpp_agree: bool | None = None
    """whether these differ by 5 % at most"""
    size_px: tuple[int, int] | None = None
    """of the image, (W, H)"""
    n_outside_image: int | None = None
    """spots whose centre lies beyond it"""
    n_off_tissue: int | None = None
    """spots whose centre lies off the tissue that was found"""
    gene_names: str = ""
    """``symbols``, ``Ensembl`` or ``mixed``"""
    species: str = ""
    """``human`` or ``mouse``, by the genes' names; empty where they do not tell"""
    patient: str = ""
    """as the metadata name it"""
    features: list[str] | None = None
    """stores found, by encoder"""
    panel_missing: list[str] | None = None
    """genes of the panel that are not measured"""
    has_image: bool | None = None
    """whether a slide image is known; not known of a section that cannot be read"""
    note: str = ""
    """what was left out, or is not there"""
    warnings: list[str] = field(default_factory=list)
    """what to look at before a run"""
    faults: list[str] = field(default_factory=list)
    """what would stop a run"""
    overlay: str = ""
    """path of the picture of its spots on the tissue; empty where none was made"""


@dataclass
class CheckResult:
    """Rows, what is wrong with a path as a whole, and what several sections have in common."""

    sections: list[SectionReport]
    faults: list[str]
    duplicates: list[str]

    @property
    def all_faults(self) -> list[str]:
        """Everything that would stop a run."""
        return [*self.faults, *(fault for row in self.sections for fault in row.faults)]


def check_sections(
    paths: Sequence[str],
    *,
    out: Path | None = None,
    features: Path | None = None,
    panel: Panel | None = None,
    **options,
) -> CheckResult:
    """Read every section and slide that ``paths`` name and look at each; one that fails does not stop the next.

    Writes ``<section>.png`` (spots on tissue) into ``out``. ``options`` are fields of ``ReadOptions``.
    """
    rows, faults, prints = [], [], []
    for path in paths:
        try:
            refs = find_sections(path)
            how = options_for(refs, **used_by(refs, options))
        except InputError as error:
            faults.append(str(error))
            continue
        for ref in refs:
            row = SectionReport(ref.id, str(ref.root), ref.format)
            rows.append(row)
            section = _read(ref, how, row)
            prints.append(_fingerprint(section) if section is not None else "")
            if section is not None:
                _look_at_counts(section, row)
                _look_at_features(section, features, row)
                _look_at_panel(section, panel, row)
                _look_at_image(section, out, _free_name(ref, rows), row)
    return CheckResult(rows, faults, _duplicates(rows, prints))


def _read(ref: SectionRef, options: ReadOptions, row: SectionReport) -> AnnData | None:
    """The section; what it warns of and why it is refused go into the row."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return ref.read(options)
        except InputError as error:
            row.faults.append(str(error))
            if isinstance(error, NoRawCountsError):
                row.raw_counts = False
            return None
        finally:
            row.warnings += [str(w.message) for w in caught if issubclass(w.category, SectionWarning)]


def _look_at_counts(section: AnnData, row: SectionReport) -> None:
    facts, library = section.uns[contract.GENAR], section.obs[contract.LIBRARY_SIZE].to_numpy()
    row.section, row.n_spots, row.n_genes = contract.name(section), section.n_obs, section.n_vars
    row.format = contract.SIMULATED if contract.of_simulation(section) else row.format
    row.mpp, row.mpp_by = contract.mpp(section), dict(facts[contract.MPP_BY])
    row.mpp_agree = not disagreeing(row.mpp_by)
    row.patient, row.note, row.counts_from = facts[contract.PATIENT], facts[contract.NOTE], facts[contract.COUNTS_FROM]
    if not contract.has_counts(section):
        return
    row.raw_counts, row.n_empty = True, int((library == 0).sum())
    row.library_size = {"min": int(library.min()), "median": float(np.median(library)), "max": int(library.max())}
    row.gene_names, row.species = name_genes(section.var_names, section.var.get("gene_ids"))


def name_genes(names: Iterable[str], ids=None) -> tuple[str, str]:
    """Kind of the gene names (``symbols``, ``Ensembl``, ``mixed``) and the species they speak of (``human``, ``mouse``,
    or nothing): by Ensembl's prefix where there are ids, else by case, as human symbols are upper case.

    >>> name_genes(["KRT8", "ERBB2", "C1orf159"])
    ('symbols', 'human')
    >>> name_genes(["Krt8", "Erbb2", "Ywhah"])
    ('symbols', 'mouse')
    >>> name_genes(["ENSMUSG00000020473", "ENSMUSG00000000001.4"])
    ('Ensembl', 'mouse')
    >>> name_genes(["GRCh38_KRT8", "GRCh38_ERBB2"])
    ('symbols', 'human')
    """
    texts = pd.Series(list(names), dtype=str).str.replace(_OF_A_GENOME, "", regex=True)
    ensembl = texts.str.fullmatch(_ENSEMBL)
    share = ensembl.mean()
    kind = "Ensembl" if share > _SHARE else "symbols" if share < 1 - _SHARE else "mixed"
    known = pd.Series(list(ids) if ids is not None else list(texts[ensembl]), dtype=str)
    for prefix, species in (("ENSG0", "human"), ("ENSMUSG0", "mouse")):
        if len(known) and known.str.startswith(prefix).mean() > _SHARE:
            return kind, species
    letters = pd.Series(list(texts[~ensembl & texts.str.contains("[A-Za-z]{2}")]), dtype=str)
    letters = letters.str.replace(r"(?<=\d)orf(?=\d)", "", regex=True)
    if len(letters) and letters.str.isupper().mean() > _SHARE:
        return kind, "human"
    if len(letters) and (letters.str[:1].str.isupper() & ~letters.str.isupper()).mean() > _SHARE:
        return kind, "mouse"
    return kind, ""


def _look_at_features(section: AnnData, store: Path | None, row: SectionReport) -> None:
    """The encoders whose features of these very spots are in the folder; stores of others are left alone."""
    if store is None:
        return
    if not store.is_dir():
        row.faults.append(f"--features {store}: no such folder")
        return
    import zarr

    row.features = []
    for path in stores_of(contract.name(section), store):
        try:
            with door(path, "feature store", "delete it and embed again"):
                check_zarr(path, "delete it and embed again")
                group = zarr.open_group(path, mode="r")
                spots = [str(name) for name in group["barcode"][:]]  # pyright: ignore
                if group.attrs["section"] == contract.name(section) and spots == list(section.obs_names):
                    row.features.append(str(group.attrs["encoder"]))
        except InputError as error:
            row.faults.append(str(error))


def _look_at_panel(section: AnnData, panel: Panel | None, row: SectionReport) -> None:
    if panel is None or not contract.has_counts(section):
        return
    known = set(section.var_names)
    row.panel_missing = [gene for gene in panel.genes if gene not in known]
    if row.panel_missing:
        try:
            contract.counts(section[:0], list(panel.genes))
        except InputError as error:
            row.faults.append(str(error))


def _look_at_image(section: AnnData, out: Path | None, name: str, row: SectionReport) -> None:
    """Spots against image and tissue; the overlay is written even where they do not fit."""
    path, tissue = contract.slide_path(section), None
    row.has_image = path is not None
    if path is None:
        enough = "no image (--image): enough for a panel and scores"
        row.note = "; ".join(filter(None, (row.note, enough)))
    else:
        try:
            row.size_px, tag = image_head(path)
            if tag:
                row.mpp_by.setdefault("image", tag)
            xy = contract.coords_px(section)
            row.n_outside_image = int(((xy < 0) | (xy >= np.asarray(row.size_px))).any(axis=1).sum())
            contract.check_inside(section, row.size_px)
        except InputError as error:
            row.faults.append(str(error))
        if row.size_px is not None:
            tissue = _look_at_tissue(section, path, row)
    if out is not None:
        row.overlay = str(maps.write_overlay(section, out / f"{name}.png", tissue))


def _look_at_tissue(section: AnnData, path: Path, row: SectionReport):
    try:
        view, mask, size_px, _ = tissue_of(path, contract.mpp(section))
    except InputError as error:
        row.faults.append(str(error))
        return None
    off = ~on_tissue(contract.coords_px(section), mask, size_px)
    row.n_off_tissue = int(off.sum())
    if off.mean() > _FEW_ON_TISSUE:
        row.warnings.append(
            f"section {row.section}: {row.n_off_tissue} of {section.n_obs} spots lie off the tissue that was found; "
            "look at the overlay: do coordinates and image belong together?"
        )
    return view, mask, size_px


def _free_name(ref: SectionRef, rows: Sequence[SectionReport]) -> str:
    """Name of the overlay: the section's, with the folder's where another section is called the same."""
    stem = Path(ref.id).stem if ref.format == "slide" else ref.id
    earlier = sum(row.section == rows[-1].section or row.section == stem for row in rows[:-1])
    return f"{stem}_{earlier + 1}" if earlier else stem


def _fingerprint(section: AnnData) -> str:
    """Hash of counts and positions, whatever the names; empty where there are no counts."""
    if not contract.has_counts(section):
        return ""
    x = section.X
    digest = hashlib.sha256(contract.coords_px(section).round(2).tobytes())
    for part in (x.indptr, x.indices, x.data):  # pyright: ignore
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _duplicates(rows: Sequence[SectionReport], prints: Sequence[str]) -> list[str]:
    """Lines on sections that occur twice and on patients who are in several folders: between them nothing is tested."""
    lines = []
    for kind, keys in (("id", [row.section for row in rows]), ("counts", list(prints))):
        for key in dict.fromkeys(keys):
            same = [row for row, other in zip(rows, keys, strict=True) if key and other == key]
            if len(same) > 1:
                where = ", ".join(f"{row.section} in {row.path}" for row in same)
                lines.append(f"the same {kind} {len(same)} times: {where}")
    for patient in dict.fromkeys(row.patient for row in rows if row.patient):
        paths = list(dict.fromkeys(row.path for row in rows if row.patient == patient))
        if len(paths) > 1:
            lines.append(f"patient {patient} is in {len(paths)} folders: {', '.join(paths)}")
    return lines
