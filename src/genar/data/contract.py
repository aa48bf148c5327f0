"""The contract of a tissue section: which AnnData slots hold what, and in which unit.

Other files name the slots by the constants here. A section is an AnnData of N spots by all measured genes:

===============================  ==================================================================
``X``                            csr, integers >= 0: raw counts
``obs["library_size"]``          int [N]: total over ALL genes of the file, before any is dropped
``obsm["spatial"]``              float64 [N, 2]: spot centres (x, y) in full-resolution px
``uns["genar"]``                 ``section``, ``slide`` (path or ""), ``mpp`` (um per px), ``spot_diameter_um``,
                                 ``pitch_um`` (distance between spot centres), ``source`` (format), ``patient``;
                                 ``mpp_by`` (pixel size by each source that has one: ``metadata``, ``pitch``,
                                 ``image``), ``counts_from`` (``X`` or a layer), ``note`` (what was dropped)
``uns["spatial"][library_id]``   scanpy's images (those of Space Ranger uint8, at most 2000 px) and scalefactors
===============================  ==================================================================
"""

import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse

from genar.errors import InputError, NoRawCountsError, SectionWarning, first_names

SPATIAL = "spatial"
LIBRARY_SIZE = "library_size"
GENAR = "genar"
SECTION, SLIDE, MPP = "section", "slide", "mpp"
SPOT_DIAMETER_UM, PITCH_UM, SOURCE, PATIENT = "spot_diameter_um", "pitch_um", "source", "patient"
MPP_BY, COUNTS_FROM, NOTE = "mpp_by", "counts_from", "note"
# Layers of a prediction; X holds the integer counts.
MEAN, LOG1P_MEAN, P_ZERO, SD = "mean", "log1p_mean", "p_zero", "sd"
# Columns of a prediction's var: each gene's counts over the training spots.
TRAINING_MEAN, TRAINING_VARIANCE = "training_mean", "training_variance"
# In uns["genar"] of a prediction, how it was made; in there, whom the model was trained on.
PREDICTION = "prediction"
TRAINING_SECTIONS, TRAINING_PATIENTS = "training_sections", "training_patients"
TRAINED_ON_SIMULATED = "trained_on_simulated_tissue"
# Where a section comes from if it is nobody's; of a checkpoint's training, whether one was such.
SIMULATED = "simulated"
VISIUM_SPOT_UM = 55.0
_COARSEST_UM = 4.0
_NO_NAME = re.compile(r"[/\\\x00-\x1f\x7f]|^[A-Za-z]:")
_LONGEST_NAME = 200  # bytes
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}")
_DENSE_AT_ONCE = 1 << 22  # values


def new_section(
    adata: AnnData,
    *,
    section: str,
    slide: str | Path = "",
    mpp: float,
    spot_diameter_um: float,
    pitch_um: float = 0.0,
    source: str,
    patient: str = "",
    mpp_by: dict[str, float] | None = None,
    counts_from: str = "X",
    note: str = "",
) -> AnnData:
    """Fill the contract's own slots of ``adata`` in place (X becomes csr float32), check it and return it.

    Raises ``InputError`` as :func:`check` does.
    """
    check_name(section)
    if adata.X is None:
        raise NoRawCountsError(f"section {section}: X is missing; expected raw counts in X or in layers['counts']")
    for what, value in (("pixel size", mpp), ("spot diameter", spot_diameter_um), ("pitch", pitch_um)):
        if not (1e-3 <= value <= 1e3 if what == "pixel size" else 0 <= value <= 1e6):
            raise InputError(f"section {section}: a {what} of {value} um cannot be right; pass --mpp, or mend the file")
    if mpp > _COARSEST_UM:
        warnings.warn(
            f"section {section}: a pixel of {mpp:g} um is coarser than H&E is scanned at (0.1 to 2 um); is it right?",
            SectionWarning,
            stacklevel=2,
        )
    adata.X = _as_csr(adata.X)
    adata.uns[GENAR] = {
        SECTION: section,
        SLIDE: str(slide),
        MPP: float(mpp),
        SPOT_DIAMETER_UM: float(spot_diameter_um),
        PITCH_UM: float(pitch_um),
        SOURCE: source,
        PATIENT: patient,
        MPP_BY: dict(mpp_by or {}),
        COUNTS_FROM: counts_from,
        NOTE: note,
    }
    check(adata, counts_from)
    adata.obs[LIBRARY_SIZE] = np.asarray(adata.X.sum(axis=1)).ravel().astype(np.int64)
    return adata


def _as_csr(x) -> sparse.csr_matrix:
    """Counts as csr float32. A dense matrix goes some rows at a time: its indices take four times its own memory."""
    if sparse.issparse(x):
        return without_duplicates(sparse.csr_matrix(x, dtype=np.float32))
    rows = max(1, _DENSE_AT_ONCE // max(1, x.shape[1]))
    blocks = [sparse.csr_matrix(x[i : i + rows], dtype=np.float32) for i in range(0, x.shape[0], rows)]
    return sparse.csr_matrix(sparse.vstack(blocks, "csr")) if blocks else sparse.csr_matrix(x.shape, dtype=np.float32)


def without_duplicates(x: sparse.csr_matrix) -> sparse.csr_matrix:
    """The matrix with one entry a place: else squares of entries are not those of values."""
    if not x.has_canonical_format:
        x = x.copy()
        x.sum_duplicates()
    return x


def patient_of(stated: object) -> str:
    """Name of a patient, as metadata state it: a text, a number, or nothing."""
    if stated is None or stated != stated:
        return ""
    return f"{stated:.0f}" if isinstance(stated, float) and stated.is_integer() else str(stated)


def check_name(section: object) -> None:
    """Refuse an id that is no name of a file: results are written under it. Raises ``InputError``."""
    is_name = isinstance(section, str) and section.strip(". ") and not _NO_NAME.search(section)
    if not is_name or len(str(section).encode()) > _LONGEST_NAME:
        shown = str(section)[:60]
        raise InputError(f"section {shown!r}: its id must be a plain name, without / \\ : or line ends; rename it")


def name(adata: AnnData) -> str:
    """The section's id. Raises ``InputError`` where it has none."""
    if SECTION not in (facts := adata.uns.get(GENAR, {})):
        raise InputError(
            f"an AnnData without uns['{GENAR}']['{SECTION}'], of {adata.n_obs} spots; expected a section as "
            "genar.read_section gives it: read its file with that"
        )
    return str(facts[SECTION])


def slide_path(adata: AnnData) -> Path | None:
    """Path of the section's slide image; ``None`` where there is none."""
    slide = str(adata.uns.get(GENAR, {}).get(SLIDE, ""))
    return Path(slide) if slide else None


def no_image_message(adata: AnnData, purpose: str) -> str:
    """What to say of a section that lacks the image for some ``purpose``: how one of its format is given."""
    section, source = name(adata), adata.uns[GENAR].get(SOURCE)
    place = f"put it to wsis/{section}.tif, or " if source in ("hest", SIMULATED) else ""
    return (
        f"section {section}: no slide image for {purpose}; {place}pass --image FILE, or --image FOLDER that holds "
        f"{section}.tif"
    )


def libraries(adata: AnnData) -> list[dict]:
    """The dicts of ``uns["spatial"]``, one a library, as scanpy keeps them."""
    spatial = adata.uns.get(SPATIAL, {})
    return [library for library in spatial.values() if isinstance(library, dict)] if isinstance(spatial, dict) else []


def picture(adata: AnnData) -> tuple[np.ndarray, tuple[float, float]] | None:
    """The largest image within ``uns["spatial"]``, uint8 [h, w, 3], and the full-resolution size (W, H) px that its
    scale factor gives it; ``None`` where there is none."""
    found = []
    for library in libraries(adata):
        for kind, image in library.get("images", {}).items():
            scale = library.get("scalefactors", {}).get(f"tissue_{kind}_scalef")
            values = np.asarray(image)
            if scale and values.ndim == 3 and values.shape[2] >= 3:
                found.append((values[..., :3], (values.shape[1] / float(scale), values.shape[0] / float(scale))))
    if not found:
        return None
    image, size = max(found, key=lambda one: one[0].size)
    if image.dtype != np.uint8:
        image = (np.clip(image * (255 if image.max() <= 1 else 1), 0, 255)).round().astype(np.uint8)
    return np.ascontiguousarray(image), size


def mpp(adata: AnnData) -> float:
    """Pixel size of the full-resolution image, um per px. Raises ``InputError`` where nothing says it,
    or it is none."""
    facts = adata.uns.get(GENAR, {})
    if MPP not in facts:
        raise InputError(f"no pixel size: expected uns['{GENAR}']['{MPP}'], um per px, as genar.read_section has it")
    if not float(facts[MPP]) > 0:
        raise InputError(f"pixel size uns['{GENAR}']['{MPP}'] must be above 0 um, found {facts[MPP]}; predict again")
    return float(facts[MPP])


def has_counts(adata: AnnData) -> bool:
    """Whether anything was measured: spots laid on a bare slide have no genes."""
    return adata.n_vars > 0


def spot_diameter_px(adata: AnnData) -> float:
    """Diameter of a spot in full-resolution px; 55 um where it is not known (0)."""
    return (float(adata.uns.get(GENAR, {}).get(SPOT_DIAMETER_UM, 0)) or VISIUM_SPOT_UM) / mpp(adata)


def coords_px(adata: AnnData) -> np.ndarray:
    """Spot centres, float64 [N, 2], (x, y) in full-resolution px. Raises ``InputError`` where it has none."""
    if SPATIAL not in adata.obsm:
        raise InputError(
            f"an AnnData without obsm['{SPATIAL}'], of {adata.n_obs} spots; expected spot centres [N, 2] in px, as "
            "genar.read_section gives them"
        )
    xy = np.asarray(adata.obsm[SPATIAL], dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2:
        raise InputError(f"obsm['{SPATIAL}'] must be spot centres [N, 2], (x, y), found shape {list(xy.shape)}")
    return xy


def coords_um(adata: AnnData) -> np.ndarray:
    """Spot centres, float64 [N, 2], (x, y) in um from the corner of the image."""
    return coords_px(adata) * mpp(adata)


def counts(adata: AnnData, genes: list[str] | None = None) -> np.ndarray:
    """Raw counts as int32 [N, G], dense, in the order of ``genes`` (all genes where not given).

    Raises ``InputError`` naming the genes the section lacks.
    """
    return np.rint(dense(adata.X if genes is None else _of_genes(adata, genes))).astype(np.int32)


def dense(values) -> np.ndarray:
    """A matrix, sparse or dense, of memory or of a file that is open, as an array of its own type."""
    values = in_memory(values)
    return values.toarray() if sparse.issparse(values) else np.asarray(values)  # pyright: ignore


def in_memory(values):
    """A matrix of memory as it is, one of an open file (anndata's backed mode) as it is read."""
    return values if isinstance(values, np.ndarray) or sparse.issparse(values) else values[:]


def layer_names(adata: AnnData) -> list[str]:
    """Names of the layers; X, which anndata 0.13 counts among them under no name, is none."""
    return [name for name in adata.layers if name is not None]


def layer(adata: AnnData, name: str) -> np.ndarray:
    """A layer [N, G], dense."""
    return dense(adata.layers[name])


def values(adata: AnnData, genes: list[str]) -> np.ndarray:
    """X of a prediction as it is scored, float64 [N, G]: other methods' may be fractional. Raises as :func:`counts`."""
    return np.asarray(dense(_of_genes(adata, genes)), dtype=np.float64)


def expected_log2(adata: AnnData, genes: list[str] | None = None) -> np.ndarray:
    """The best that a prediction says, in log2(1 + count) space, float64 [N, G]: its expectation of that, else X.

    Raises as :func:`counts`.
    """
    genes = list(adata.var_names) if genes is None else genes
    if LOG1P_MEAN not in adata.layers:
        return np.log2(1 + values(adata, genes))
    return layer(adata[:, genes], LOG1P_MEAN).astype(np.float64) / np.log(2)


def expected_counts(adata: AnnData) -> np.ndarray:
    """Expected counts, float64 [N, G]: of a prediction with the expectation of ln(1 + count) alone what that is in
    counts, of one without either its X."""
    if MEAN in adata.layers:
        return layer(adata, MEAN).astype(np.float64)
    if LOG1P_MEAN in adata.layers:
        return np.expm1(layer(adata, LOG1P_MEAN).astype(np.float64))
    return values(adata, list(adata.var_names))


def has_expectation(adata: AnnData) -> bool:
    """Whether a prediction says what it expects, beside its X."""
    return MEAN in adata.layers or LOG1P_MEAN in adata.layers


def _of_genes(adata: AnnData, genes: list[str]):
    """The columns of X."""
    if genes and not has_counts(adata):
        raise InputError(f"section {name(adata)}: a slide without counts; name sections that have them")
    place = adata.var_names.get_indexer(genes)
    if missing := [gene for gene, found in zip(genes, place, strict=True) if found < 0]:
        raise InputError(
            f"section {name(adata)}: {len(missing)} of {len(genes)} panel genes missing ({first_names(missing, 5)}"
            f"{spelling_hint(missing, adata.var_names)}); use a panel of genes that every section measures: "
            "`genar panel` selects one, or makes one of a list, by other names with --aliases"
        )
    if not isinstance(adata.X, np.ndarray) and not sparse.issparse(adata.X):
        return adata[:, genes].X  # of an open file
    # not by a view of the AnnData: a view and its parts hold each other, and so all genes, until Python looks for such
    return adata.X[:, place]  # pyright: ignore


def spelling_hint(missing: Iterable[str], measured: Iterable[str]) -> str:
    """What to say of names that are ``missing`` where they are ``measured`` under another spelling or kind of id; else
    nothing."""
    spelled = {gene.casefold(): gene for gene in measured}
    other = [spelled[gene.casefold()] for gene in missing if gene.casefold() in spelled]
    if other:
        return f"; perhaps {first_names(other, 5)}"
    if any(map(_ENSEMBL.match, missing)) and not any(map(_ENSEMBL.match, spelled.values())):
        return "; these are Ensembl ids, the section has symbols"
    return ""


def cut(adata: AnnData, genes: list[str], *, images: bool = False) -> AnnData:
    """The section with those genes alone and, unless asked for, without its images, as training keeps it; itself where
    it is that already.

    Raises ``InputError`` naming the genes the section lacks.
    """
    if list(adata.var_names) == genes and (images or SPATIAL not in adata.uns):
        return adata
    kept = AnnData(sparse.csr_matrix(_of_genes(adata, genes)), obs=adata.obs.copy())  # pyright: ignore
    kept.var_names, kept.obsm[SPATIAL] = genes, adata.obsm[SPATIAL]
    kept.uns = {name: adata.uns[name] for name in ((GENAR, SPATIAL) if images else (GENAR,)) if name in adata.uns}
    return kept


def digest(adata: AnnData) -> str:
    """sha256 of names, coordinates and counts."""
    found = hashlib.sha256("\n".join((*adata.obs_names, *adata.var_names)).encode())
    found.update(coords_px(adata).tobytes())
    for part in (adata.X.indptr, adata.X.indices, adata.X.data):  # pyright: ignore
        found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


def check(adata: AnnData, counts_from: str = "X") -> None:
    """Refuse what is not a section of raw counts.

    Raises ``InputError`` with one line that names the section, what was found and what to do: no spots, spot or gene
    names that are empty or not unique, NaN or infinite, negative, fractional (log-transformed or normalised) counts,
    coordinates that are missing, not finite or all alike.
    """
    where = f"section {name(adata)}"
    if adata.n_obs == 0:
        raise InputError(f"{where}: expected at least one spot, found none; is this the right file?")
    check_names(adata, where)
    check_counts(adata, where, counts_from)
    if SPATIAL not in adata.obsm:
        raise InputError(f'{where}: expected spot centres in obsm["{SPATIAL}"], found none; add them in px, (x, y)')
    xy = np.asarray(adata.obsm[SPATIAL])
    if xy.ndim != 2 or xy.shape[1] != 2 or not np.isfinite(xy.astype(float)).all():
        raise InputError(f'{where}: obsm["{SPATIAL}"] must be finite numbers [N, 2], found shape {xy.shape}')
    if adata.n_obs > 1 and not np.ptp(xy, axis=0).any():
        raise InputError(f"{where}: all {adata.n_obs} spots lie at the same point; expected one centre per spot")


def check_prediction(adata: AnnData, where: str = "") -> None:
    """``InputError`` where a prediction of any method cannot be shown: a name that is missing or stands twice, a place
    or a value (of X or a layer) that is NaN or infinite."""
    check_names(adata, where or "the prediction")
    told = f"{where}: " if where else ""
    if not np.isfinite(coords_px(adata)).all():
        raise InputError(f"{told}obsm['{SPATIAL}'] holds NaN or infinite places; expected px of every spot")
    for part, values in matrices(adata):
        if not np.isfinite(stored(values)).all():
            raise InputError(
                f"{told}{part} holds NaN or infinite values; expected counts: predict again, or leave it out"
            )


def matrices(adata: AnnData) -> Iterator[tuple[str, Any]]:
    """X and the layers, each with the words that name it."""
    if adata.X is not None:
        yield "X", in_memory(adata.X)
    for layer_name in layer_names(adata):
        yield f"layers['{layer_name}']", in_memory(adata.layers[layer_name])


def stored(values) -> np.ndarray:
    """The values of a matrix that are written down: all but the zeros of a sparse one."""
    return values.data if sparse.issparse(values) else np.asarray(values)


def check_names(adata: AnnData, where: str) -> None:
    """``InputError`` where a spot or gene has no name, or the name of another."""
    for kind, names in (("spot", adata.obs_names), ("gene", adata.var_names)):
        if not names.is_unique:
            twice = names[names.duplicated()][0]
            raise InputError(f"{where}: {kind} name {twice!r} occurs more than once; make the {kind} names unique")
        if bad := [one for one in names if not one or "\0" in one]:  # NumPy would cut them short
            raise InputError(f"{where}: {kind} name {bad[0]!r} is empty or holds a NUL; name each {kind}")


def trained_on_note(prediction: AnnData) -> str:
    """What a reader of scores must know where the model behind ``prediction`` was trained on its very section, or on
    another of its patient; else nothing."""
    facts = prediction.uns.get(GENAR, {})
    section = str(facts.get(SECTION, ""))
    made = facts.get(PREDICTION, {})
    sections, patients = (set(map(str, made.get(name, ()))) for name in (TRAINING_SECTIONS, TRAINING_PATIENTS))
    if made.get(TRAINED_ON_SIMULATED) and not of_simulation(prediction):
        return "the model was trained on SIMULATED tissue: what it predicts says nothing of real tissue"
    if section in sections:
        return f"the model was trained on section {section}: its scores there say nothing of other tissue"
    if (patient := str(facts.get(PATIENT, ""))) in patients:
        return f"the model was trained on sections of {patient}, too: generalisation between patients is not tested"
    return ""


def of_simulation(adata: AnnData) -> bool:
    """Whether the spots are of simulated tissue."""
    return adata.uns.get(GENAR, {}).get(SOURCE) == SIMULATED


def simulated(adata: AnnData) -> bool:
    """Whether a section, or what a prediction's model was trained on, is simulated tissue."""
    made = adata.uns.get(GENAR, {}).get(PREDICTION, {})
    return of_simulation(adata) or bool(made.get(TRAINED_ON_SIMULATED, False))


def check_same_places(predicted: AnnData, truth: AnnData, who: str) -> None:
    """Refuse a truth (of ``who``) whose spots lie elsewhere: names such as 3x7 occur on every slide."""
    both = predicted.obs_names.intersection(truth.obs_names)
    if not len(both) or not (predicted.obs_names.is_unique and truth.obs_names.is_unique):
        return  # what is wrong with the names is said where they are aligned
    apart = np.linalg.norm(coords_um(predicted[both]) - coords_um(truth[both]), axis=1)
    if (apart > spot_diameter_px(truth) * mpp(truth)).any():
        raise InputError(
            f"{who}: spot {both[apart.argmax()]} of {name(truth)} lies {apart.max():.0f} um from where the prediction "
            f"of {name(predicted)} has it; are both of the same section, with one --mpp and --bin-um?"
        )


def check_counts(adata: AnnData, where: str, counts_from: str = "X") -> None:
    """``NoRawCountsError`` where X, which may have come from a layer, holds other things than raw counts."""
    if adata.X is None:
        raise NoRawCountsError(
            f"{where}: X is missing; expected raw counts there (perhaps they are in layers['counts'])"
        )
    x, held = in_memory(adata.X), f"{where}: {counts_from} holds"
    values = stored(x)
    if not np.isfinite(values).all():
        raise NoRawCountsError(f"{held} NaN or infinite values; expected raw counts, whole numbers >= 0")
    if (values < 0).any():
        raise NoRawCountsError(f"{held} negative values (least {values.min():g}); expected raw counts >= 0")
    fractional = values != np.rint(values)
    if fractional.any():
        found = f"fractional values such as {values[fractional].flat[0]:g}"
        if values.max() < 25:  # ln(1 + count) of any real spot stays below 20
            found += f" and a maximum of {values.max():.2f}, so it looks log-transformed"
        place = "perhaps in layers['counts'] or .raw"
        if counts_from != "X":
            place = f"{counts_from} goes before X: delete it where X holds them"
        elif adata.raw is not None:
            place = ".raw is not read: where it holds them, adata.layers['counts'] = adata.raw[:, adata.var_names].X"
        raise NoRawCountsError(f"{held} {found}; expected raw counts ({place})")
    if values.size and values.max() >= 2**31:
        raise NoRawCountsError(f"{held} {values.max():g}; expected raw counts below 2^31")


def check_inside(adata: AnnData, size_px: tuple[int, int]) -> None:
    """Refuse spot centres outside an image of ``size_px`` (W, H): ``InputError`` with their number and one of them."""
    xy = coords_px(adata)
    outside = ((xy < 0) | (xy >= np.asarray(size_px))).any(axis=1)
    if outside.any():
        x, y = xy[outside][0]
        raise InputError(
            f"section {name(adata)}: {int(outside.sum())} of {adata.n_obs} spots lie outside the image of "
            f"{size_px[0]} x {size_px[1]} px (first: {adata.obs_names[outside][0]} at {x:.0f}, {y:.0f}); "
            "obsm['spatial'] must be (x, y) in full-resolution px of this very image"
        )


def section_key(text: str) -> list[int | str]:
    """Sort key that puts SPA9 before SPA10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]
