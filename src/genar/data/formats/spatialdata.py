"""SpatialData ``.zarr``: a table of counts, the shapes it annotates, an image (extra ``spatialdata``).

Spots are the centroids of the shapes, taken through the coordinate system that shapes and image share into px of the
image's full resolution. A store is one section: of a table of several regions the rows of the shapes are read, and
shapes of several regions are refused.
"""

from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from genar.data import contract, reading
from genar.data.door import check_zarr, door, read_json
from genar.data.formats.h5ad import as_section
from genar.data.reading import ReadOptions
from genar.errors import InputError

NAME = "spatialdata"
EXPECTED = "SpatialData stores (.zarr with tables, shapes and images)"


def sections(root: Path) -> list[str]:
    """Ids of the stores in ``root``: itself, or each store in it."""
    if _is_store(root):
        return [root.stem]
    return [path.stem for path in root.glob("*.zarr") if not path.name.startswith(".") and _is_store(path)]


def _is_store(folder: Path) -> bool:
    for name in ("zarr.json", ".zattrs"):
        try:
            attributes = read_json(folder / name, "Zarr group")
        except InputError:
            continue
        inner = attributes.get("attributes", attributes)
        if isinstance(inner, dict) and "spatialdata_attrs" in inner:
            return True
    return False


def read(root: Path, section: str, options: ReadOptions) -> AnnData:
    """Read one store as the contract has it.

    Raises ``InputError`` where the package is missing, the store is damaged or holds no table with shapes, or where
    there are several and none can be told from the others.
    """
    path = root if _is_store(root) else root / f"{section}.zarr"
    try:
        import spatialdata
    except ImportError as error:
        raise reading.missing_package(path, "spatialdata", "spatialdata") from error
    with door(path, "SpatialData store"):
        check_zarr(path / "tables")
        store = spatialdata.read_zarr(path, selection=("images", "shapes", "tables"))  # pyright: ignore
        adata, region = _table(store, path)
        reading.check_sparse(adata.X)
    name = _image_name(store, region, path) if options.image is None else None
    adata.obsm[contract.SPATIAL], diameter_px = _spots_px(store, adata, region, name, path)
    if diameter_px and not reading.spot_diameter_px(adata):
        factors = {"spot_diameter_fullres": diameter_px}
        adata.uns[contract.SPATIAL] = {section: {"images": {}, "scalefactors": factors}}
    image = reading.named_image(section, options)
    if name is not None:
        group = path / "images" / name
        image = next(p for file in ("zarr.json", ".zattrs") if (p := group / file).is_file())
    return as_section(adata, section, options, image, NAME)


def _table(store, path: Path) -> tuple[AnnData, str]:
    """The one table that annotates one element of shapes, and that element's name."""
    found = []
    for table in store.tables.values():
        regions = table.uns.get("spatialdata_attrs", {}).get("region")
        regions = [regions] if isinstance(regions, str) else list(regions if regions is not None else ())
        found += [(table, region) for region in regions if region in store.shapes]
    if len(found) != 1:
        names = ", ".join(region for _, region in found) or "none"
        raise InputError(
            f"{path}: expected one table that annotates one element of shapes, found {len(found)} ({names}); "
            "write the one to use to a store of its own (sdata.subset)"
        )
    table, region = found[0]
    key = table.uns["spatialdata_attrs"].get("region_key")
    rows = table.obs[key].astype(str) == region if key in table.obs else slice(None)  # others are of other elements
    return table[rows].copy(), region


def _image_name(store, region: str, path: Path) -> str | None:
    """The image that shares a coordinate system with the shapes; the largest of several. ``None`` without images."""
    from spatialdata.transformations import get_transformation

    def systems(element: Any) -> set[str]:
        return set(get_transformation(element, get_all=True))  # pyright: ignore

    of_shapes = systems(store.shapes[region])
    fitting = [name for name, image in store.images.items() if of_shapes & systems(image)]
    return max(fitting, key=lambda name: _n_px(store.images[name]), default=None)


def _n_px(image) -> int:
    first = next(iter(image["scale0"].data_vars.values())) if hasattr(image, "children") else image
    return int(np.prod(first.shape))


def _spots_px(store, adata: AnnData, region: str, image: str | None, path: Path) -> tuple[np.ndarray, float]:
    """Centroids [N, 2] (x, y) of the table's shapes, px of the image (of the shapes' own frame without one), and their
    diameter where they are circles, else 0."""
    from spatialdata.transformations import get_transformation

    shapes, key = store.shapes[region], adata.uns["spatialdata_attrs"]["instance_key"]
    lost = [name for name in adata.obs[key] if name not in shapes.index]
    if lost:
        raise InputError(f"{path}: {len(lost)} rows of the table have no shape in {region} (first: {lost[0]})")
    centroids = shapes.loc[adata.obs[key]].geometry.centroid
    diameter = 2 * float(shapes["radius"].median()) if "radius" in shapes else 0.0
    xy = np.column_stack([centroids.x, centroids.y, np.ones(len(centroids))])
    if image is None:
        return xy[:, :2], diameter
    of_shapes: Any = get_transformation(shapes, get_all=True)
    of_image: Any = get_transformation(store.images[image], get_all=True)
    system = sorted(set(of_shapes) & set(of_image))[0]
    axes = {"input_axes": ("x", "y"), "output_axes": ("x", "y")}
    to_system, from_image = (t[system].to_affine_matrix(**axes) for t in (of_shapes, of_image))
    to_px = np.linalg.inv(from_image) @ to_system
    return (xy @ to_px.T)[:, :2], diameter * float(np.sqrt(abs(np.linalg.det(to_px[:2, :2]))))
