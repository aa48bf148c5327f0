"""A folder that Vitessce shows: a SpatialData store and the configuration of its views."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from anndata import AnnData

from genar.data import contract
from genar.data.files import replacing
from genar.export._common import cut, missing
from genar.export.spatialdata import IMAGE, SPOTS, TABLE, write_spatialdata
from genar.report.maps import background

STORE, CONFIG = "prediction.sdata.zarr", "vitessce.json"
URL = "http://localhost:8000"


def write_vitessce(predicted: AnnData, path: str | Path, *, genes: Sequence[str] = ()) -> Path:
    """Write a folder with ``prediction.sdata.zarr`` and ``vitessce.json``: spots over the H&E, genes, a heat map.

    The configuration names the store under ``http://localhost:8000``, as a web server in that folder offers it.
    Raises ``InputError`` as ``write_export`` does.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of its widgets, which nobody asked for
            from vitessce import (  # pyright: ignore
                CoordinationLevel,
                SpatialDataWrapper,
                VitessceConfig,
                get_initial_coordination_scope_prefix,
                hconcat,
                vconcat,
            )
            from vitessce import ViewType as View  # pyright: ignore
    except ImportError as error:
        raise missing("vitessce", "vitessce") from error
    path, chosen = Path(path), cut(predicted, genes)
    name = contract.name(chosen)
    has_image = background(chosen, 64) is not None
    told = "Gene counts predicted from H&E"
    config = VitessceConfig(schema_version="1.0.17", name=f"Section {name}", description=told)
    data = config.add_dataset(name=name, uid="prediction").add_object(
        SpatialDataWrapper(
            sdata_url=f"{URL}/{STORE}",
            image_path=f"images/{IMAGE}" if has_image else None,
            table_path=f"tables/{TABLE}",
            obs_feature_matrix_path=f"tables/{TABLE}/X",
            obs_spots_path=f"shapes/{SPOTS}",
            region=SPOTS,
            coordinate_system="global",
            coordination_values={"obsType": "spot"},
        )
    )
    spatial = config.add_view("spatialBeta", dataset=data)
    layers = config.add_view("layerControllerBeta", dataset=data)
    listed = config.add_view(View.FEATURE_LIST, dataset=data)
    heat = config.add_view(View.HEATMAP, dataset=data)
    views = [spatial, layers, listed, heat]
    config.link_views(
        views, ["obsType", "featureSelection", "obsColorEncoding"],
        ["spot", [str(chosen.var_names[0])], "geneSelection"],
    )  # fmt: skip
    if has_image:  # else its red is drawn in blue
        prefix = get_initial_coordination_scope_prefix("prediction", "image")
        layer = CoordinationLevel([{"photometricInterpretation": "RGB"}])
        config.link_views_by_dict([spatial, layers], {"imageLayer": layer}, scope_prefix=prefix)
    config.layout(hconcat(vconcat(spatial, heat), vconcat(listed, layers), split=[3, 1]))
    with replacing(path) as temporary:
        temporary.mkdir()
        write_spatialdata(chosen, temporary / STORE)
        (temporary / CONFIG).write_text(json.dumps(config.to_dict(), indent=1), encoding="utf-8")
    return path
