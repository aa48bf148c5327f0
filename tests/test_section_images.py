"""Which file is a section's image, and which images are not read as what they are not."""

import json

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from genar.data import contract, find_sections, read_section
from genar.data.slide import glance, open_slide
from genar.errors import InputError
from section_files import write_visium


@pytest.mark.parametrize("channels", [3, 4])
def test_a_png_of_16_bits_a_colour_is_refused(tmp_path, channels):
    deep = np.random.default_rng(0).integers(0, 255, (40, 50, channels), dtype=np.uint16) * 16  # 12 bits of 16
    (tmp_path / "deep.png").write_bytes(imagecodecs.png_encode(deep))
    for look in (open_slide, lambda path: glance(path, 20)):
        with pytest.raises(InputError, match=r"expected an 8-bit RGB image, found RGBA?;16B; convert it to RGB"):
            look(tmp_path / "deep.png")


def test_a_picture_as_large_as_the_image_does_not_stand_in_its_way(tmp_path):
    outs = tmp_path / "P1" / "outs"
    write_visium(outs)
    Image.new("RGB", (2000, 1800), "white").save(outs / "spatial" / "tissue_hires_image.png")
    Image.new("RGB", (2000, 1800), "white").save(tmp_path / "P1.jpg")
    path = outs / "spatial" / "scalefactors_json.json"
    for scale in (1.0, 0.9):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tissue_hires_scalef": scale}))
        if scale == 1:
            assert contract.slide_path(read_section(outs, image=tmp_path / "P1.jpg")) == tmp_path / "P1.jpg"
        else:
            with pytest.raises(InputError, match="downsampled tissue_hires_image"):
                read_section(outs, image=tmp_path / "P1.jpg")


@pytest.mark.parametrize("suffix", [".ome.tif", ".ome.tiff"])
def test_an_ome_tiff_is_found_by_its_name(tmp_path, suffix):
    write_visium(tmp_path / "P1" / "outs")
    (tmp_path / "images").mkdir()
    image = tmp_path / "images" / f"P1{suffix}"
    tifffile.imwrite(image, np.full((1800, 2000, 3), 200, np.uint8), photometric="rgb")
    assert contract.slide_path(read_section(tmp_path / "P1" / "outs", image=tmp_path / "images")) == image


@pytest.mark.filterwarnings("ignore")
def test_squares_of_a_spatialdata_store_have_a_width_and_a_distance(tmp_path, recwarn):
    import pandas as pd
    import shapely
    from anndata import AnnData

    sd = pytest.importorskip("spatialdata")
    import geopandas
    from spatialdata.models import Image2DModel, ShapesModel, TableModel

    side, n = 16.0, 12
    corners = [(16.0 * (i % n), 16.0 * (i // n)) for i in range(n * n)]
    names = pd.Index([f"b{i}" for i in range(n * n)])
    squares = geopandas.GeoDataFrame(geometry=[shapely.box(x, y, x + side, y + side) for x, y in corners], index=names)
    table = AnnData(np.ones((n * n, 3), np.float32))
    table.obs_names = names
    table.obs["region"], table.obs["instance_id"] = pd.Categorical(["bins"] * len(names)), names
    table = TableModel.parse(table, region="bins", region_key="region", instance_key="instance_id")
    image = Image2DModel.parse(np.full((3, 200, 200), 200, np.uint8), dims=("c", "y", "x"))
    store = sd.SpatialData(images={"he": image}, shapes={"bins": ShapesModel.parse(squares)}, tables={"t": table})
    store.write(tmp_path / "S1.zarr")
    facts = read_section(tmp_path / "S1.zarr", mpp=0.5).uns[contract.GENAR]
    assert facts["spot_diameter_um"] == pytest.approx(8, rel=1e-6)
    assert facts["pitch_um"] == pytest.approx(8, rel=1e-6)
    assert any("bins of 8 um, taken as they are" in str(warning.message) for warning in recwarn.list)
    (tmp_path / "patients.csv").write_text("section,patient\nS1,Ann\n")
    assert read_section(tmp_path / "S1.zarr", mpp=0.5).uns[contract.GENAR][contract.PATIENT] == "Ann"
    assert find_sections(tmp_path)[0].patient == "Ann"
