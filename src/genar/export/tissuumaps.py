"""A TissUUmaps project: ``.tmap``, and beside it the spots as CSV and the image."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import tifffile
from anndata import AnnData

from genar.data import contract
from genar.data.files import replacing, write_text
from genar.export._common import IMAGE_PX, cut
from genar.report.maps import background

UID = "genar"
_DISC = 0.85  # of its diameter is the size of a disc: TissUUmaps (3.2) draws it wider


def write_tissuumaps(predicted: AnnData, path: str | Path, *, genes: Sequence[str] = ()) -> Path:
    """Write ``NAME.tmap`` with ``NAME_tmap.csv`` (a row a spot, expected counts a column a gene) and ``NAME_tmap.tif``
    beside it: names that no slide has.

    TissUUmaps colours the spots, drawn as wide as they are, by the gene that is chosen in the drop-down list. Positions
    are px of the image written here; without an image, full-resolution px. The project file is written last. Raises
    ``InputError`` as ``write_export`` does.
    """
    path, chosen = Path(path), cut(predicted, genes)
    names = list(map(str, chosen.var_names))
    xy, mpp = contract.coords_px(chosen), contract.mpp(chosen)
    layers, diameter = [], contract.spot_diameter_px(chosen)
    if (found := background(chosen, IMAGE_PX)) is not None:
        image, (width, _) = found
        shrink = image.shape[1] / width
        xy, mpp, diameter = xy * shrink, mpp / shrink, diameter * shrink
        picture = path.with_name(f"{path.stem}_tmap.tif")
        with replacing(picture) as temporary:
            tifffile.imwrite(temporary, image, photometric="rgb", compression="jpeg", tile=(256, 256))
        layers = [{"name": "H&E", "tileSource": f"{picture.name}.dzi"}]
    places = {axis: [f"{value:.2f}" for value in xy[:, i]] for i, axis in enumerate("xy")}  # the format is for counts
    table = pd.DataFrame({**places, "spot": list(chosen.obs_names)})
    table = pd.concat(
        [table, pd.DataFrame(contract.expected_counts(chosen), columns=pd.Index([f"gene {name}" for name in names]))],
        axis=1,
    )
    spots = path.with_name(f"{path.stem}_tmap.csv")
    write_text(spots, table.to_csv(index=False, float_format="%.5g"))
    header = {
        "X": "x", "Y": "y", "gb_col": "null", "gb_name": "null", "cb_cmap": "interpolateViridis",
        "cb_col": f"gene {names[0]}", "cb_gr_dict": "", "scale_col": "null", "coord_factor": "1",
        "scale_factor": f"{_DISC * diameter:.5g}", "shape_col": "null", "shape_fixed": "disc",
        "shape_gr_dict": "", "pie_col": "null", "opacity": "0.85", "tooltip_fmt": "{spot}",
    }  # fmt: skip
    radios = {
        "cb_col": True, "cb_gr": False, "cb_gr_rand": False, "cb_gr_dict": False, "cb_gr_key": False,
        "pie_check": False, "scale_check": False, "shape_col": False, "shape_fixed": True, "shape_gr": False,
        "shape_gr_rand": False, "shape_gr_dict": False,
    }  # fmt: skip
    markers = {
        "title": "Predicted genes", "name": "Predicted genes", "comment": "Expected counts", "uid": UID,
        "autoLoad": True, "hideSettings": True, "path": spots.name, "expectedHeader": header, "expectedRadios": radios,
        "dropdownOptions": [
            {"optionName": name, "name": name, "expectedHeader.cb_col": f"gene {name}"} for name in names
        ],
        "settings": [],
    }  # fmt: skip
    project = {
        "filename": contract.name(chosen),
        "layers": layers,
        "markerFiles": [markers],
        "mpp": mpp,
        # a spot is as wide as it is in the tissue, whatever the zoom: scale_factor is in px of the image
        "settings": [{"module": "glUtils", "function": "_useAbsoluteMarkerSize", "value": {UID: True}}],
    }
    write_text(path, json.dumps(project, indent=1))
    return path
