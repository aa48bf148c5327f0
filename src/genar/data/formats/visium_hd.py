"""Visium HD: ``binned_outputs/square_002um``, ``_008um``, ``_016um``, each laid out like Space Ranger's ``outs``.

Bins are pooled into square spots ``bin_um`` wide: counts are summed, a spot lies in the middle of its square. A square
of which less than half is under tissue is left out. Positions are parquet files (extra ``visium-hd``: pyarrow is a
large package that nothing else here needs).
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from genar.data import contract, pictures, reading
from genar.data.formats.visium import folders, image, read_matrix, read_positions, read_scalefactors, refuse_downsampled
from genar.data.reading import ReadOptions
from genar.errors import InputError

NAME = "visium_hd"
EXPECTED = "Visium HD outs (binned_outputs/square_008um)"


def sections(root: Path) -> list[str]:
    """Ids of the sections in ``root``: itself, or each folder in it (or the ``outs`` of that)."""
    return list(folders(root, _bins))


def _bins(outs: Path) -> dict[int, Path]:
    """Width of the bins, um -> folder."""
    found = {}
    for path in (outs / "binned_outputs").glob("square_*um"):
        if (match := re.fullmatch(r"square_(\d+)um", path.name)) and path.is_dir():
            found[int(match[1])] = path
    return found


def read(root: Path, section: str, options: ReadOptions) -> AnnData:
    """Read one section as the contract has it, pooled from the widest bins that fit ``options.bin_um`` evenly.

    Raises ``InputError`` where no bins fit, a file is missing or damaged, or pyarrow is not installed.
    """
    bins = _bins(folders(root, _bins)[section])
    fitting = [width for width in bins if options.bin_um % width == 0]
    if not fitting:
        have = ", ".join(f"{width}" for width in sorted(bins))
        raise InputError(f"section {section}: --bin-um {options.bin_um:g} is no multiple of the bins there ({have} um)")
    width, folder = max(fitting), bins[max(fitting)]
    adata, places, factors = read_matrix(folder), read_positions(folder), read_scalefactors(folder)
    unknown = adata.obs_names.difference(places.index)
    if len(unknown):
        raise InputError(f"{folder}: {len(unknown)} bins have no position (first: {unknown[0]}); are they a pair?")
    adata = adata[(places["in_tissue"].loc[adata.obs_names] != 0).to_numpy()]
    to_px, step_px = _affine(folder, places)
    pooled, note = _pool(adata, places, round(options.bin_um / width))
    centre = pd.DataFrame(pooled.obs)[["array_row", "array_col"]].to_numpy(float)
    centre = (centre + 0.5) * round(options.bin_um / width) - 0.5  # in bins; a bin's own position is its middle
    pooled.obsm[contract.SPATIAL] = np.column_stack([centre, np.ones(len(centre))]) @ to_px
    slide = image(root, section, options)
    if slide is not None:
        refuse_downsampled(slide, folder / "spatial", factors)
    mpp, by = reading.pixel_size(
        section,
        options,
        metadata_mpp=factors.get("microns_per_pixel"),
        pitch_mpp=width / step_px,
        slide=slide,
    )
    library, lost = pictures.of_space_ranger(folder / "spatial", factors)
    library["scalefactors"]["spot_diameter_fullres"] = options.bin_um / mpp  # Space Ranger's is that of a bin
    pooled.uns[contract.SPATIAL] = {section: library}
    return contract.new_section(
        pooled,
        section=section,
        slide=slide or "",
        mpp=mpp,
        spot_diameter_um=options.bin_um,
        pitch_um=options.bin_um,
        source=NAME,
        mpp_by=by,
        note="; ".join(filter(None, (note, lost))),
    )


def _affine(folder: Path, places: pd.DataFrame) -> tuple[np.ndarray, float]:
    """[3, 2] that takes (row, column, 1) of a bin to (x, y) px, fitted on all bins; and px from bin to bin."""
    array = np.column_stack([places[["array_row", "array_col"]].to_numpy(float), np.ones(len(places))])
    xy = places[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)
    if len(places) < 3 or not np.isfinite(xy).all():
        raise InputError(f"{folder}: expected finite positions of at least three bins, found {len(places)}")
    to_px = np.linalg.lstsq(array, xy, rcond=None)[0]
    return to_px, float(np.linalg.norm(to_px[:2], axis=1).mean())


def _pool(adata: AnnData, places: pd.DataFrame, factor: int) -> tuple[AnnData, str]:
    """Sum squares of ``factor`` x ``factor`` bins; those of which less than half is under tissue are dropped."""
    under = places.loc[places["in_tissue"] != 0]
    area = (under[["array_row", "array_col"]] // factor).value_counts()
    kept = area[area >= factor**2 / 2].sort_index()
    squares = pd.MultiIndex.from_frame(places.loc[adata.obs_names, ["array_row", "array_col"]] // factor)
    to = kept.index.get_indexer(squares)
    inside = to >= 0
    pool = sparse.csr_matrix((np.ones(inside.sum()), (to[inside], np.flatnonzero(inside))), (len(kept), adata.n_obs))
    rows = np.asarray([list(key) for key in kept.index], dtype=int).reshape(-1, 2)  # pyright: ignore
    obs = pd.DataFrame({"array_row": rows[:, 0], "array_col": rows[:, 1], "n_bins": kept.to_numpy()})
    obs.index = pd.Index([f"{row:04d}x{col:04d}" for row, col in rows])
    pooled = AnnData(sparse.csr_matrix(pool @ adata.X, dtype=np.float32), obs=obs, var=pd.DataFrame(adata.var))
    lost = len(area) - len(kept)
    return pooled, f"{lost} squares with less than half under tissue are dropped" if lost else ""
