"""Space Ranger (Visium): ``filtered_feature_bc_matrix.h5`` or its folder of the same name, and ``spatial/``.

A section is an ``outs`` folder; a folder of several is several sections, each called like the folder that holds it.
The full-resolution image is not among the outputs: it is named apart (``--image``). Spot centres are 100 um apart.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from genar.data import contract, pictures, reading
from genar.data.door import check_columns, check_hdf5, door, number, open_bytes, open_text, read_json, refuse_large
from genar.data.reading import ReadOptions
from genar.errors import InputError

NAME = "visium"
EXPECTED = "Space Ranger outs (filtered_feature_bc_matrix.h5, spatial/)"
_MATRIX = "filtered_feature_bc_matrix"
_POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]


def sections(root: Path) -> list[str]:
    """Ids of the sections in ``root``: itself, or each folder in it (or the ``outs`` of that)."""
    return list(folders(root, _is_outs))


def incomplete(root: Path) -> list[str]:
    """Folders of ``root`` that hold counts as Space Ranger writes them, but no places of spots."""
    held = ((folder, outs) for folder in sorted(root.iterdir()) for outs in (folder, folder / "outs"))
    found = [f"{folder.name} (no spatial/)" for folder, outs in held if _has_matrix(outs) and not _is_outs(outs)]
    return list(dict.fromkeys(found))


def _has_matrix(folder: Path) -> bool:
    return (folder / f"{_MATRIX}.h5").is_file() or (folder / _MATRIX).is_dir()


def of_file(path: Path) -> tuple[Path, str] | None:
    """Folder and id of a section named by its matrix file."""
    root = path.parent
    return (root, sections(root)[0]) if path.name == f"{_MATRIX}.h5" and _is_outs(root) else None


def _is_outs(folder: Path) -> bool:
    if re.fullmatch(r"square_\d+um", folder.name) and (folder / f"{_MATRIX}.h5").is_file():
        raise InputError(
            f"{folder}: bins of Visium HD; name the outs folder around them, --bin-um says how to pool them"
        )
    return (folder / "spatial").is_dir() and _has_matrix(folder)


def folders(root: Path, is_one) -> dict[str, Path]:
    """Section id -> folder of each that ``is_one`` in ``root``; an ``outs`` folder is called like the one around it."""
    if is_one(root):
        around = Path(os.path.abspath(root))  # not resolved: a link is called as it is called
        return {(around.parent if around.name == "outs" else around).name: root}
    if (root / "outs").is_dir() and is_one(root / "outs"):
        return {Path(os.path.abspath(root)).name: root / "outs"}
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        for candidate in (folder, folder / "outs"):
            if folder.name not in found and candidate.is_dir() and is_one(candidate):
                found[folder.name] = candidate
    return found


def image(root: Path, section: str, options: ReadOptions) -> Path | None:
    """The one that ``--image`` names."""
    return reading.named_image(section, options)


def read(root: Path, section: str, options: ReadOptions) -> AnnData:
    """Read one section as the contract has it; spots with ``in_tissue`` 0 are dropped.

    Gene names are symbols, made unique as scanpy does; ``var["gene_ids"]`` keeps the Ensembl ids. The PNGs
    in ``spatial/`` come along in ``uns["spatial"]``; one that cannot be read is left out, with a note. Raises
    ``InputError`` where a file is missing or damaged, or where ``--image`` names the downsampled PNG of Space Ranger.
    """
    folder = folders(root, _is_outs)[section]
    adata, factors = read_matrix(folder), read_scalefactors(folder)
    places = read_positions(folder)
    unknown = adata.obs_names.difference(places.index)
    if len(unknown):
        raise InputError(f"{folder}: {len(unknown)} barcodes have no position (first: {unknown[0]}); are they a pair?")
    adata.obs = places.loc[adata.obs_names]
    xy = places[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)
    pitch_px = reading.visium_pitch_px(places[["array_row", "array_col"]].to_numpy(float), xy)  # of all, seen or not
    outside = int((adata.obs["in_tissue"] == 0).sum())
    adata = adata[adata.obs["in_tissue"] != 0].copy()
    adata.obsm[contract.SPATIAL] = pd.DataFrame(adata.obs)[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)
    slide = image(root, section, options)
    if slide is not None:
        refuse_downsampled(slide, folder / "spatial", factors)
    pitch, stated = reading.VISIUM_PITCH_UM / pitch_px, factors.get("microns_per_pixel")
    mpp, by = reading.pixel_size(section, options, metadata_mpp=stated, pitch_mpp=pitch, slide=slide)
    library, lost = pictures.of_space_ranger(folder / "spatial", factors)
    adata.uns[contract.SPATIAL] = {section: library}
    dropped = f"{outside} spots are not under tissue and are dropped" if outside else ""
    return contract.new_section(
        adata,
        section=section,
        slide=slide or "",
        mpp=mpp,
        spot_diameter_um=contract.VISIUM_SPOT_UM,
        pitch_um=reading.VISIUM_PITCH_UM,
        source=NAME,
        mpp_by=by,
        note="; ".join(filter(None, (dropped, lost))),
    )


def read_matrix(folder: Path) -> AnnData:
    """Gene expression of ``filtered_feature_bc_matrix.h5``, or of the folder of that name where there is no ``.h5``."""
    path = folder / f"{_MATRIX}.h5"
    x, barcodes, features = _read_h5(path) if path.is_file() else _read_mtx(folder / _MATRIX)
    if x.shape != (len(barcodes), len(features)):
        raise InputError(f"{folder}: matrix of shape {x.shape} for {len(barcodes)} barcodes and {len(features)} genes")
    if "feature_type" in features:  # antibodies and the like are left out
        expression = (features["feature_type"] == "Gene Expression").to_numpy()
        if not expression.any():
            raise InputError(
                f"{folder}: no gene expression among the features of the matrix; is it of antibodies alone?"
            )
        x, features = x[:, expression], features.loc[expression]
    adata = AnnData(x.astype(np.float32), obs=pd.DataFrame(index=pd.Index(barcodes)))
    adata.var = pd.DataFrame({"gene_ids": features["id"].to_numpy()}, index=pd.Index(features["name"].to_numpy()))
    adata.var_names_make_unique()
    return adata


def _read_h5(path: Path):
    import h5py

    with door(path, "10x matrix"):
        check_hdf5(path)
        with h5py.File(path) as file:
            matrix: Any = file["matrix"]
            parts = tuple(matrix[name][:] for name in ("data", "indices", "indptr"))
            n_genes, n_spots = (int(n) for n in matrix["shape"][:])
            barcodes = [text.decode() for text in matrix["barcodes"][:]]
            names = [name for name in ("id", "name", "feature_type") if name in matrix["features"]]
            features = pd.DataFrame({name: [text.decode() for text in matrix["features"][name][:]] for name in names})
        by_spot = sparse.csc_matrix(parts, shape=(n_genes, n_spots))  # stored gene by spot, column by column
        reading.check_sparse(by_spot)
        return by_spot.T.tocsr(), barcodes, features


def _read_mtx(folder: Path):
    def lines(*names: str) -> list[list[str]]:
        path = next((p for name in names for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
        if path is None:
            raise InputError(f"{folder}: expected {names[0]}.gz or {names[0]}, found neither; copy the folder again")
        with open_text(path, share=16) as file:
            return [line.rstrip("\r\n").split("\t") for line in file]

    with door(folder, "10x matrix folder"):
        barcodes = [row[0] for row in lines("barcodes.tsv")]
        rows = [[*row, "Gene Expression"][:3] for row in lines("features.tsv", "genes.tsv")]
        path = next(
            (p for p in (folder / "matrix.mtx.gz", folder / "matrix.mtx") if p.is_file()), folder / "matrix.mtx"
        )
        x = _read_coordinates(path, (len(rows), len(barcodes)))
        return x, barcodes, pd.DataFrame(rows, columns=pd.Index(["id", "name", "feature_type"]))


def _read_coordinates(path: Path, shape: tuple[int, int]) -> sparse.csr_matrix:
    """A matrix market file of genes by spots, as spots by genes. Its head is looked at first: it is believed."""
    from scipy.io import mminfo, mmread

    with open_bytes(path) as file:
        n_rows, n_columns, n_values, form, *_ = mminfo(file)  # pyright: ignore
    if form != "coordinate" or (n_rows, n_columns) != shape:
        raise InputError(
            f"{path}: {form} matrix of {n_rows} x {n_columns} for {shape[0]} features and {shape[1]} barcodes; are "
            "they of one section?"
        )
    refuse_large(path, "matrix", 16 * n_values, path.stat().st_size)
    with open_bytes(path) as file:
        return sparse.csr_matrix(mmread(file).T)  # pyright: ignore


def read_positions(folder: Path) -> pd.DataFrame:
    """The spots' places, index barcode: ``in_tissue``, ``array_row``, ``array_col``, ``pxl_row_in_fullres``,
    ``pxl_col_in_fullres``. With header (Space Ranger 2.0 and later), without (before), or parquet (Visium HD)."""
    path = next((p for name in _POSITIONS if (p := _packed(folder / "spatial" / name)).is_file()), None)
    if path is None:
        raise InputError(f"{folder / 'spatial'}: expected one of {', '.join(_POSITIONS)}, found none; copy it there")
    try:
        if path.suffix == ".parquet":
            places = _read_parquet(path)
        else:
            with door(path, "table of spot positions"):
                places = _read_table(path)
    except ImportError as error:
        raise reading.missing_package(path, "pyarrow", "visium-hd") from error
    if missing := set(_COLUMNS) - set(places) - {places.index.name}:
        raise InputError(f"{path}: expected columns {', '.join(_COLUMNS)}, found no {', '.join(sorted(missing))}")
    places = places.set_index("barcode") if "barcode" in places else places
    if not places.index.is_unique:
        raise InputError(f"{path}: barcode {places.index[places.index.duplicated()][0]} occurs more than once")
    for name in _COLUMNS[1:]:
        if not pd.api.types.is_numeric_dtype(places[name]):
            raise InputError(f"{path}: column {name} must hold numbers, found {str(places[name].iloc[0])[:60]!r}")
    return places.rename_axis(None).loc[:, _COLUMNS[1:]]


def _packed(path: Path) -> Path:
    """The file, or that of the same name with ``.gz`` where it alone is there."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.is_file() and not path.is_file() else path


def _read_table(path: Path) -> pd.DataFrame:
    """With header or without; spreadsheets write quotes around its names, and a mark before them."""
    named = check_columns(path, ",").lstrip('\ufeff"').startswith("barcode")
    with open_text(path) as file:
        places = pd.read_csv(file, header=0 if named else None, names=None if named else _COLUMNS)
    return places.rename(columns=lambda name: str(name).lstrip("\ufeff"))


def _read_parquet(path: Path) -> pd.DataFrame:
    with door(path, "table of spot positions"):
        from pyarrow import parquet

        groups = parquet.ParquetFile(path).metadata
        sizes = (groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
        refuse_large(path, "a table", max(sum(sizes), 8 * groups.num_rows * groups.num_columns), path.stat().st_size)
        return pd.read_parquet(path)


def read_scalefactors(folder: Path) -> dict:
    """``spatial/scalefactors_json.json``."""
    path = _packed(folder / "spatial" / "scalefactors_json.json")
    factors = read_json(path, "JSON of scale factors", "copy the whole spatial folder of Space Ranger")
    for key in ("microns_per_pixel", "tissue_hires_scalef", "tissue_lowres_scalef"):
        number(path, key, factors.get(key))
    return factors


def refuse_downsampled(image: Path, spatial: Path, factors: dict) -> None:
    """``InputError`` where the image is one of Space Ranger's own downsampled pictures, under whatever name."""
    from PIL import Image

    if image.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        return
    for kind in ("hires", "lowres"):
        if (factors.get(f"tissue_{kind}_scalef") or 1) >= 1:  # as large as the image itself
            continue
        name = f"tissue_{kind}_image.png"
        same = image.name == name
        if not same and (spatial / name).is_file():
            try:
                with (
                    Image.open(image, formats=("JPEG", "PNG")) as one,
                    Image.open(spatial / name, formats=("PNG",)) as other,
                ):
                    same = one.size == other.size
            except (OSError, SyntaxError, Image.DecompressionBombError):
                continue  # who reads its pixels says so
        if same:
            raise InputError(
                f"{image}: this is Space Ranger's downsampled {name}; expected the full-resolution image "
                "that Space Ranger was given (spots are in its px)"
            )
