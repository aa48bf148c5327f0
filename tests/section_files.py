"""Small sections in every format, written as other programs write them."""

import gzip
import json

import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from PIL import Image
from scipy import io, sparse

GENES = [
    ("ENSG00000000001", "KRT8"),
    ("ENSG00000000002", "TBCE"),
    ("ENSG00000000003", "TBCE"),
    ("ENSG00000000004", "B2M"),
]
FACTORS = {"spot_diameter_fullres": 89.4, "tissue_hires_scalef": 0.05, "fiducial_diameter_fullres": 144.5,
           "tissue_lowres_scalef": 0.015}  # fmt: skip
STEP_PX = 100 / 0.5  # Visium's pitch at 0.5 um per px


def write_legacy(folder, section="X1", *, flat=True):
    """Counts, selection and image of three selected spots (one without counts) and one that is not selected."""
    counts, spots, images = (folder, folder, folder) if flat else (folder / n for n in ("cnts", "spots", "imgs/p/X1"))
    for path in (counts, spots, images):
        path.mkdir(parents=True, exist_ok=True)
    with gzip.open(counts / f"{section}.tsv.gz", "wt") as file:
        file.write("\tGENE1\tGENE2\n10x9\t1\t0\n10x10\t5\t7\n11x10\t0\t2\n3x3\t9\t9\n")
    rows = ["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected"]
    for x, y, selected in ((11, 10, 1), (10, 10, 1), (12, 12, 1), (10, 9, 1), (3, 3, 0)):
        rows.append(f"{x}\t{y}\t{x + 0.02}\t{y}\t{x * 250.5}\t{y * 250.0}\t{selected}")
    (spots / f"{section}_selection.tsv").write_text("\n".join(rows))
    Image.fromarray(np.full((3400, 3400, 3), 200, np.uint8)).save(images / ("scan.jpg" if not flat else "X1.jpg"))
    return folder


def edit_text(path, old, new):
    """Replace text in a plain or gzipped file."""
    if path.suffix == ".gz":
        text = gzip.decompress(path.read_bytes()).decode()
        assert old in text
        path.write_bytes(gzip.compress(text.replace(old, new).encode()))
    else:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))


def spot_table(n_rows=6, n_cols=12):
    """Visium's array: columns of one row differ by two; the last spot of each row lies off the tissue."""
    rows = []
    for row in range(n_rows):
        for col in range(row % 2, n_cols, 2):
            y, x = 500 + row * STEP_PX * np.sqrt(3) / 2, 400 + col * STEP_PX / 2
            rows.append((f"AAAC{row:02d}{col:02d}-1", int(col < n_cols - 2), row, col, round(y), round(x)))
    return rows


def counts_of(rows):
    return np.random.default_rng(0).poisson(2, (len(rows), len(GENES)))


def write_10x_h5(path, x, barcodes, genes=GENES, antibodies=0):
    """The documented layout: gene by spot, compressed by column."""
    x = np.column_stack([x, np.full((len(x), antibodies), 77)]) if antibodies else x
    genes = [*genes, *((f"AB{i}", f"CD{i}") for i in range(antibodies))]
    matrix = sparse.csc_matrix(x.T)
    kinds = ["Gene Expression"] * (len(genes) - antibodies) + ["Antibody Capture"] * antibodies
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(barcodes, "S")
        group["data"], group["indices"] = matrix.data.astype(np.uint32), matrix.indices.astype(np.uint32)
        group["indptr"], group["shape"] = matrix.indptr.astype(np.uint32), np.array(matrix.shape, np.uint64)
        features = group.create_group("features")
        features["_all_tag_keys"] = np.array(["genome"], "S")
        features["id"], features["name"] = (np.array([gene[i] for gene in genes], "S") for i in (0, 1))
        features["feature_type"], features["genome"] = np.array(kinds, "S"), np.array(["GRCh38"] * len(genes), "S")


def write_10x_mtx(folder, x, barcodes):
    folder.mkdir()
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        io.mmwrite(file, sparse.coo_matrix(x.T))
    with gzip.open(folder / "barcodes.tsv.gz", "wt") as file:
        file.write("\n".join(barcodes) + "\n")
    with gzip.open(folder / "features.tsv.gz", "wt") as file:
        file.writelines(f"{number}\t{name}\tGene Expression\n" for number, name in GENES)


def write_visium(outs, *, matrix="h5", header=True, all_barcodes=False):
    """An outs folder as Space Ranger writes it; the filtered matrix holds spots under tissue, unless told otherwise."""
    rows = spot_table()
    (outs / "spatial").mkdir(parents=True)
    kept = [row for row in rows if row[1] or all_barcodes]
    kept = kept[::-1]  # barcodes are not in the order of the positions
    write = {"h5": lambda *a: write_10x_h5(outs / "filtered_feature_bc_matrix.h5", *a, antibodies=2),
             "mtx": lambda *a: write_10x_mtx(outs / "filtered_feature_bc_matrix", *a)}[matrix]  # fmt: skip
    write(counts_of(kept), [row[0] for row in kept])
    names = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres\n"
    name = "tissue_positions.csv" if header else "tissue_positions_list.csv"
    lines = "".join(",".join(map(str, row)) + "\n" for row in rows)
    (outs / "spatial" / name).write_text((names if header else "") + lines)
    (outs / "spatial" / "scalefactors_json.json").write_text(json.dumps(FACTORS))
    Image.new("RGB", (100, 90), "white").save(outs / "spatial" / "tissue_hires_image.png")
    return kept


def write_hd(outs, n=28, width=8, off=None):
    """n x n bins 8 um wide, turned a little against the image, as parquet beside a 10x matrix."""
    folder = outs / "binned_outputs" / f"square_{width:03d}um"
    (folder / "spatial").mkdir(parents=True)
    row, col = (axis.ravel() for axis in np.mgrid[:n, :n])
    turn, step = 0.02, width / 0.4
    x = 1000 + step * (np.cos(turn) * col - np.sin(turn) * row)
    y = 800 + step * (np.sin(turn) * col + np.cos(turn) * row)
    inside = np.ones(n * n, int) if off is None else (~off(row, col)).astype(int)
    barcodes = np.array([f"s_{width:03d}um_{r:05d}_{c:05d}-1" for r, c in zip(row, col, strict=True)])
    places = {"barcode": barcodes, "in_tissue": inside, "array_row": row, "array_col": col}
    pd.DataFrame({**places, "pxl_row_in_fullres": y, "pxl_col_in_fullres": x}).to_parquet(
        folder / "spatial" / "tissue_positions.parquet"
    )
    x_counts = np.random.default_rng(1).poisson(1, (n * n, len(GENES)))
    filtered = inside == 1
    write_10x_h5(folder / "filtered_feature_bc_matrix.h5", x_counts[filtered], barcodes[filtered])
    factors = {**FACTORS, "bin_size_um": width, "microns_per_pixel": 0.4}
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))
    return np.stack([x, y], axis=1).reshape(n, n, 2), (x_counts * inside[:, None]).reshape(n, n, -1)


def write_spatialdata(path, n=12, *, channels=3, name="he"):
    """A store written by the spatialdata package; image and spots have different transformations to "global"."""
    sd = pytest.importorskip("spatialdata")
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Affine, Scale

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (channels, 300, 400), dtype=np.uint8)
    scale = Scale([2.0, 2.0], axes=("x", "y"))
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), scale_factors=[2], transformations={"global": scale})
    names = pd.Index([f"s{i}" for i in range(n)])
    xy = rng.uniform(20, 280, (n, 2))
    shift = Affine([[2.0, 0, 20.0], [0, 2.0, -10.0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    shapes = ShapesModel.parse(xy, geometry=0, radius=10.0, index=names, transformations={"global": shift})
    table = AnnData(rng.poisson(3, (n, 4)).astype(np.float32))
    table.obs_names, table.var_names = names[::-1], [f"G{i}" for i in range(4)]
    table.obs["region"], table.obs["instance_id"] = pd.Categorical(["spots"] * n), names[::-1]
    table = TableModel.parse(table, region="spots", region_key="region", instance_key="instance_id")
    sd.SpatialData(images={name: image}, shapes={"spots": shapes}, tables={"table": table}).write(path)
    return pixels, (xy + np.array([10, -5]))[::-1], table


def write_h5ad(path, *, visium=True, **uns):
    rows = [row for row in spot_table() if row[1]]
    adata = AnnData(counts_of(rows).astype(np.float32), uns=uns)
    adata.obs_names, adata.var_names = [row[0] for row in rows], ["A", "B", "C", "D"]
    adata.obsm["spatial"] = np.array([(row[5], row[4]) for row in rows], float)
    if visium:
        adata.obs["array_row"], adata.obs["array_col"] = [row[2] for row in rows], [row[3] for row in rows]
    adata.write_h5ad(path)
    return adata
