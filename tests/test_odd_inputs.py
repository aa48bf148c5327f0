"""Inputs that are sound but not as the formats' pages draw them: sparse, quoted, packed, renamed, concatenated."""

import shutil

import pytest
import tifffile
import torch

from genar.encoders.weights import fit_weights
from genar.errors import InputError
from genar.features.recipe import _fingerprint
from section_files import write_spatialdata
from slides import noise

# --- features


def test_a_changed_image_is_another_slide(tmp_path):
    pixels = noise(3000, 2000)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb")
    before = _fingerprint(tmp_path / "x.tif")
    pixels[1000:2000] = pixels[1000:2000, :, ::-1]
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb")
    assert _fingerprint(tmp_path / "x.tif") != before


@pytest.mark.filterwarnings("ignore")
def test_a_changed_store_is_another_slide(tmp_path):
    pytest.importorskip("spatialdata")
    marks = []
    for turn in (False, True):
        write_spatialdata(tmp_path / "S1.zarr")
        image = tmp_path / "S1.zarr" / "images" / "he"
        if turn:
            chunk = max((path for path in image.rglob("c/*/*/*") if path.is_file()), key=lambda p: p.stat().st_size)
            chunk.write_bytes(chunk.read_bytes()[::-1])
        marks.append(_fingerprint(image / "zarr.json"))
        shutil.rmtree(tmp_path / "S1.zarr")
    assert marks[0] != marks[1]


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_weights_with_two_classifiers_fit_the_encoder(name):
    import timm

    whole, encoder = timm.create_model(name), timm.create_model(name, num_classes=0)
    fit_weights(encoder, whole.state_dict(), "here")
    x = torch.zeros(1, 3, 224, 224)
    assert encoder.eval()(x).shape == (1, encoder.num_features)
    with pytest.raises(InputError, match="not weights of this network"):
        fit_weights(encoder, {"nonsense": torch.zeros(1)}, "here")
