"""SpatialData ``.zarr``: the image, the spots as circles, a table of counts that annotates them."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from anndata import AnnData

from genar.data import contract
from genar.data.files import replacing
from genar.errors import InputError
from genar.export._common import IMAGE_PX, cut, missing, plain_table
from genar.report.maps import background

IMAGE, SPOTS, TABLE = "he", "spots", "table"
_PYRAMID = (2, 2)


def write_spatialdata(predicted: AnnData, path: str | Path, *, genes: Sequence[str] = ()) -> Path:
    """Write a store that spatialdata, napari-spatialdata and squidpy read, whole or not at all.

    ``images/he`` is the slide at up to 4,000 px, ``shapes/spots`` are the circles in full-resolution px,
    ``tables/table`` holds X and layers. Coordinate system ``global`` is full-resolution px, ``um`` micrometres. Without
    an image the store has none. Raises ``InputError`` as ``write_export`` does.
    """
    try:
        from spatialdata import SpatialData
        from spatialdata.models import Image2DModel, ShapesModel, TableModel
        from spatialdata.transformations import Identity, Scale, Sequence
    except ImportError as error:
        raise missing("spatialdata", "spatialdata") from error
    path, chosen = Path(path), cut(predicted, genes)
    mpp = contract.mpp(chosen)
    um = Scale([mpp, mpp], axes=("x", "y"))
    table = plain_table(chosen)
    table.obs["region"] = SPOTS
    table.obs["region"] = table.obs["region"].astype("category")
    table.obs["spot"] = np.arange(table.n_obs)
    shapes = ShapesModel.parse(
        contract.coords_px(chosen), geometry=0, radius=contract.spot_diameter_px(chosen) / 2,
        transformations={"global": Identity(), "um": um},
    )  # fmt: skip
    images = {}
    if (found := background(chosen, IMAGE_PX)) is not None:
        image, (width, height) = found
        full = Scale([width / image.shape[1], height / image.shape[0]], axes=("x", "y"))
        images[IMAGE] = Image2DModel.parse(
            image.transpose(2, 0, 1), dims=("c", "y", "x"), c_coords=["r", "g", "b"], scale_factors=list(_PYRAMID),
            transformations={"global": full, "um": Sequence([full, um])},
        )  # fmt: skip
    try:
        tables = {TABLE: TableModel.parse(table, region=SPOTS, region_key="region", instance_key="spot")}
        store = SpatialData(images=images, shapes={SPOTS: shapes}, tables=tables)
    except ValueError as error:
        told = " ".join(str(error).split())[:300]
        raise InputError(f"SpatialData refuses a column or layer: {told}; rename it, or leave it out") from error
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*autosharding.*")  # zarr's note on a later release
        store.write(temporary)
    return path
