"""SpatialData ``.zarr``: a table of counts, the shapes it annotates, an image (extra ``spatialdata``).

Spots are the centroids of the shapes, taken through the coordinate system that shapes and image share into px of the
image's full resolution. A store is one section: of a table of several regions the rows of the shapes are read, and
shapes of several regions are refused.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from genar.data import contract, reading
from genar.data.door import check_zarr, door, read_json
from genar.data.formats.h5ad import as_section
from genar.data.reading import ReadOptions
from genar.data.slide import image_head
from genar.errors import InputError, SectionWarning

NAME = "spatialdata"
EXPECTED = "SpatialData stores (.zarr with tables, shapes and images)"
_BIN_UM = 20.0  # side of a square below which it is a bin, and no spot
# Space Ranger's small pictures, as spatialdata-io names them: no slides.
_DOWNSAMPLED = ("_hires_image", "_lowres_image")


def sections(root: Path) -> list[str]:
    """Ids of the stores in ``root``: itself, or each store in it."""
    if _is_store(root):
        return [root.stem]
    return [path.stem for path in root.glob("*.zarr") if not path.name.startswith(".") and _is_store(path)]


def is_prediction(root: Path, section: str) -> bool:
    """Whether a table of the store is a prediction of GenAR's."""
    inside = f"tables/*/uns/{contract.GENAR}/{contract.PREDICTION}"
    return any((root / f"{section}.zarr").glob(inside))


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
    image = reading.named_image(section, options)
    name = _image_name(store, region, image, path)
    to_px = _to_px(store, region, name)
    adata.obsm[contract.SPATIAL], diameter_px = _spots_px(store, adata, region, to_px, path)
    _rescale(adata, _scale_of(to_px))
    if diameter_px and not reading.stated_diameter_px(adata):
        factors = {"spot_diameter_fullres": diameter_px}
        adata.uns[contract.SPATIAL] = {section: {"images": {}, "scalefactors": factors}}
    if image is None and name is not None:
        group = path / "images" / name
        image = next(p for file in ("zarr.json", ".zattrs") if (p := group / file).is_file())
    made = as_section(adata, section, options, image, NAME)
    width_um = diameter_px * contract.mpp(made)
    if "radius" not in store.shapes[region] and width_um < _BIN_UM:
        warnings.warn(
            f"section {section}: bins of {width_um:.3g} um, taken as they are; the outs folder of Space Ranger is read "
            "with bins pooled to spots (--bin-um)",
            SectionWarning,
            stacklevel=2,
        )
    return made


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
    reading.refuse_prediction(table, path)
    key = table.uns["spatialdata_attrs"].get("region_key")
    rows = table.obs[key].astype(str) == region if key in table.obs else slice(None)  # others are of other elements
    return table[rows].copy(), region


def _image_name(store, region: str, given: Path | None, path: Path) -> str | None:
    """The image that shares a coordinate system with the shapes: of several an RGB one, then the largest; where another
    file is ``given`` instead, the one that is as large as that. ``None`` without.

    Raises ``InputError`` where the shapes stand in a frame of their own and no image says where the file lies in it.
    """
    of_shapes = _transformations(store.shapes[region])
    slides = {name: image for name, image in store.images.items() if not name.endswith(_DOWNSAMPLED)}
    looks = {n: _looks(image) for n, image in slides.items() if set(of_shapes) & set(_transformations(image))}
    if given is None:
        return max(looks, key=lambda name: (looks[name][0], looks[name][1] * looks[name][2]), default=None)
    size = image_head(given)[0]
    if alike := [name for name in looks if looks[name][1:] == size]:
        return alike[0]
    if not any(np.allclose(_matrix(one), np.eye(3)) for one in of_shapes.values()):
        raise InputError(
            f"{given}: of {size[0]} x {size[1]} px; no image of {path} is as large, and its spots are not in px: use "
            "an image of the store, or write the spots in px of this one"
        )
    return None


def _transformations(element: Any) -> dict[str, Any]:
    """Coordinate system -> how the element gets there."""
    from spatialdata.transformations import get_transformation

    return get_transformation(element, get_all=True)  # pyright: ignore


def _matrix(transformation: Any) -> np.ndarray:
    """[3, 3], for (x, y, 1)."""
    return transformation.to_affine_matrix(input_axes=("x", "y"), output_axes=("x", "y"))


def _looks(image: Any) -> tuple[bool, int, int]:
    """Whether an image is of 3 or 4 colours of 8 bits; its width and height, px."""
    first = next(iter(image["scale0"].data_vars.values())) if hasattr(image, "children") else image
    n = dict(zip(first.dims, first.shape, strict=True))
    return first.dtype == np.uint8 and n.get("c") in (3, 4), n["x"], n["y"]


def _to_px(store, region: str, image: str | None) -> np.ndarray:
    """[3, 3]: from the shapes' own frame to px of the image; nothing changes without one."""
    if image is None:
        return np.eye(3)
    of_shapes, of_image = _transformations(store.shapes[region]), _transformations(store.images[image])
    system = sorted(set(of_shapes) & set(of_image))[0]
    return np.linalg.inv(_matrix(of_image[system])) @ _matrix(of_shapes[system])


def _scale_of(to_px: np.ndarray) -> float:
    """Px of the image to a unit of the shapes' frame."""
    return float(np.sqrt(abs(np.linalg.det(to_px[:2, :2]))))


def _rescale(adata: AnnData, scale: float) -> None:
    """What the table says of the px of its own frame, of the image's px."""
    for library in contract.libraries(adata):
        factors = library.get("scalefactors", {})
        for name in factors:
            if name == "spot_diameter_fullres":
                factors[name] = float(factors[name]) * scale
            elif name == "microns_per_pixel" or name.endswith("_scalef"):
                factors[name] = float(factors[name]) / scale


def _spots_px(store, adata: AnnData, region: str, to_px: np.ndarray, path: Path) -> tuple[np.ndarray, float]:
    """Centroids [N, 2] (x, y) of the table's shapes in px, and their diameter: of other shapes the
    side of a square as large."""
    shapes, key = store.shapes[region], adata.uns["spatialdata_attrs"]["instance_key"]
    lost = [name for name in adata.obs[key] if name not in shapes.index]
    if lost:
        raise InputError(f"{path}: {len(lost)} rows of the table have no shape in {region} (first: {lost[0]})")
    found = shapes.loc[adata.obs[key]]
    if "radius" in shapes:
        diameter = 2 * float(found["radius"].median())
    else:  # the squares of Visium HD: their side
        diameter = float(np.sqrt(found.geometry.area.median()))
    centroids = found.geometry.centroid
    xy = np.column_stack([centroids.x, centroids.y, np.ones(len(centroids))])
    return (xy @ to_px.T)[:, :2], diameter * _scale_of(to_px)
