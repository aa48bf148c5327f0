"""GeoJSON for QuPath."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from anndata import AnnData

from genar.data import contract
from genar.data.files import MARK, replacing
from genar.export._common import cut

_CORNERS = 24  # of the polygon that stands for a round spot
_DECIMALS = 4


def write_geojson(predicted: AnnData, path: str | Path, *, genes: Sequence[str] = ()) -> Path:
    """Spots as GeoJSON that QuPath opens: a detection per spot, with the predicted counts as its measurements.

    ``predicted`` [N, G] is a prediction of GenAR, or any section that fulfils the contract. Each spot is a polygon of
    the spot's diameter in full-resolution px, named by its barcode; its measurements are the counts of ``genes`` (all
    where none is named) and, where the prediction has them, ``<gene> mean``: the expected counts. QuPath (0.4 and
    later) takes the polygon for the circle that it stands for. The file appears under its name only once it is whole.
    Raises ``InputError`` where a gene or the positions are missing.
    """
    predicted = cut(predicted, genes)
    chosen = [str(name) for name in predicted.var_names]
    names, counts, means = chosen, contract.values(predicted, chosen), np.empty((predicted.n_obs, 0))
    whole = (counts == np.rint(counts)).all()  # other methods' may be fractional
    counts = counts.astype(np.int64) if whole else counts.round(_DECIMALS)
    if contract.has_expectation(predicted):
        means = contract.expected_counts(predicted)
        names = [*chosen, *(f"{gene} mean" for gene in chosen)]
    rings = _rings(predicted)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(f'{{"type": "FeatureCollection", "software": "{MARK}", "features": [')
        # a spot at a time: all of them as objects would take far more
        for i, barcode in enumerate(predicted.obs_names):
            values = [*counts[i].tolist(), *means[i].astype(np.float64).round(_DECIMALS).tolist()]
            spot = {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [rings[i].tolist()], "isEllipse": True},
                "properties": {
                    "objectType": "detection",
                    "name": str(barcode),
                    "measurements": dict(zip(names, values, strict=True)),
                },
            }
            file.write(f"{', ' if i else ''}{json.dumps(spot)}")
        file.write("]}")
    return Path(path)


def _rings(section: AnnData) -> np.ndarray:
    """The closed outline of each spot, [N, corners + 1, 2] px."""
    angle = 2 * np.pi * np.append(np.arange(_CORNERS), 0) / _CORNERS
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1) * contract.spot_diameter_px(section) / 2
    return (contract.coords_px(section)[:, None] + circle).round(2)
