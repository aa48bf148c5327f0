"""Features made elsewhere: rows find their spots, or are refused."""

import os
import re

import h5py
import numpy as np
import pytest
import torch

from commands import run
from genar.data import contract, read_section, read_sections
from genar.encoders import load_encoder
from genar.errors import InputError
from genar.features import embed_sections, import_features, import_recipe, import_sections, read_features, recipe_of

WIDTH_PX = 225


@pytest.fixture
def section(tissue):
    return read_section(f"{tissue}:SIM1")


def made_elsewhere(section, n=5):
    return np.random.default_rng(0).normal(size=(section.n_obs, n)).astype(np.float32)


def corners(section):
    return np.floor(contract.coords_px(section) - WIDTH_PX // 2).astype(np.int64)


def write_h5(path, arrays, attributes=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file.create_dataset(name, data=value)
        file["coords"].attrs.update(attributes or {})


def write_trident(path, features, section, order):
    attributes = {"patch_size_level0": WIDTH_PX, "patch_size": 224, "level0_magnification": 20, "overlap": 0}
    write_h5(path, {"features": features[order], "coords": corners(section)[order]}, attributes)


def write_clam(path, features, section, order):
    place = path.parent / "h5_files" / path.name
    write_h5(place, {"features": features[order], "coords": corners(section)[order].astype(np.int32)})


def write_hest(path, features, section, order):
    barcodes = section.obs_names.to_numpy().astype("S")[order][:, None]
    arrays = {"embeddings": features[order], "coords": corners(section)[order], "barcodes": barcodes}
    write_h5(path, arrays)


@pytest.mark.parametrize("write", [write_trident, write_clam, write_hest])
def test_h5_rows_find_their_spots_in_any_order(section, tmp_path, write):
    features = made_elsewhere(section)
    order = np.random.default_rng(1).permutation(section.n_obs)
    write(tmp_path / "SIM1.h5", features, section, order)
    made = import_sections([section], tmp_path, "theirs", tmp_path / "store")
    np.testing.assert_array_equal(read_features(made["SIM1"], section)[:, 0], features)


@pytest.mark.parametrize("form", ["tensor", "dict", "batch axis", "npy"])
def test_pt_and_npy_are_taken_in_the_order_of_the_spots(section, tmp_path, form):
    features = made_elsewhere(section)
    if form == "npy":
        np.save(tmp_path / "SIM1.npy", features)
    else:
        tensor = torch.from_numpy(features)
        torch.save(
            {"tensor": tensor, "batch axis": tensor[None],
             "dict": {"features": tensor, "coords": torch.from_numpy(corners(section))}}[form],
            tmp_path / "SIM1.pt",
        )  # fmt: skip
    made = import_sections([section], tmp_path, "theirs", tmp_path / "store")
    np.testing.assert_array_equal(read_features(made["SIM1"], section)[:, 0], features)


def spoil_rows(path, features, section):
    np.save(path.with_suffix(".npy"), features[1:])


def spoil_shape(path, features, section):
    np.save(path.with_suffix(".npy"), features[:, 0])


def spoil_nan(path, features, section):
    features[3, 2] = np.nan
    np.save(path.with_suffix(".npy"), features)


def spoil_text(path, features, section):
    path.with_suffix(".npy").write_text("none")


class Code:
    def __reduce__(self):
        return (os.system, ("touch was_run",))


def spoil_pickle(path, features, section):
    torch.save({"features": Code()}, path.with_suffix(".pt"))


def spoil_names(path, features, section):
    write_h5(path, {"other": features, "coords": corners(section)})


def spoil_h5(path, features, section):
    path.write_bytes(b"\x89HDF\r\n")


def spoil_coords(path, features, section):
    moved = corners(section)
    moved[0] += 50
    write_h5(path, {"features": features, "coords": moved})


def spoil_axes(path, features, section):
    write_h5(path, {"features": features, "coords": corners(section) + np.array([400, 0])})


def spoil_barcodes(path, features, section):
    barcodes = section.obs_names.to_numpy().astype("S20")
    barcodes[2] = b"other"
    write_h5(path, {"features": features, "coords": corners(section), "barcodes": barcodes})


def spoil_both(path, features, section):
    barcodes = section.obs_names.to_numpy().astype("S")[::-1]
    write_h5(path, {"features": features, "coords": corners(section), "barcodes": barcodes})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_rows, "59 rows do not match the 60 spots of section SIM1"),
        (spoil_shape, r"expected features \[N, F\]"),
        (spoil_nan, "NaN or infinite"),
        (spoil_text, "not a readable .npy"),
        (spoil_pickle, "not a readable file of tensors"),
        (spoil_names, "expected an array named features"),
        (spoil_h5, "not a readable HDF5"),
        (spoil_coords, "coords do not match the 60 spots"),
        (spoil_axes, "coords do not match the 60 spots"),
        (spoil_barcodes, "barcodes do not match the 60 spots"),
        (spoil_both, "barcodes and its coords do not match"),
    ],
)
def test_rows_that_do_not_match_are_refused(tissue, section, tmp_path, monkeypatch, capsys, spoil, says):
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path / "SIM1.h5", made_elsewhere(section), section)
    words = ["features", f"{tissue}:SIM1", "--import", tmp_path, "--encoder", "theirs", "--out", tmp_path / "store"]
    assert run(monkeypatch, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(says, line), line
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "was_run").exists()


def test_nothing_is_imported_where_one_file_is_missing(tissue, section, tmp_path):
    np.save(tmp_path / "SIM1.npy", made_elsewhere(section))
    with pytest.raises(InputError, match="no features of section SIM2"):
        import_sections(read_sections(tissue), tmp_path, "theirs", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_import_twice_is_the_same_and_other_features_are_refused(section, tmp_path):
    features = made_elsewhere(section)
    file, store, recipe = tmp_path / "SIM1.npy", tmp_path / "store", import_recipe("theirs")
    np.save(file, features)
    assert import_features(section, file, recipe, store) == import_features(section, file, recipe, store)
    np.save(file, features + 1)
    with pytest.raises(InputError, match="other features of section SIM1 were imported as import:theirs"):
        import_features(section, file, recipe, store)


def test_imported_features_serve_as_an_encoder(tissue, section, tmp_path):
    encoder = load_encoder("import:theirs")
    np.save(tmp_path / "SIM1.npy", made_elsewhere(section))
    made = import_sections([section], tmp_path, "theirs", tmp_path / "store")
    found = embed_sections([section], encoder, recipe_of(encoder), tmp_path / "store")
    assert found == made
    with pytest.raises(InputError, match=r"import:theirs: .* section SIM2 are not in the store; .*--encoder theirs"):
        embed_sections([read_section(f"{tissue}:SIM2")], encoder, recipe_of(encoder), tmp_path / "store")


def test_imported_features_have_one_precision():
    with pytest.raises(InputError, match="computes in fp32, not in bf16; leave it out"):
        load_encoder("import:mine", precision="bf16")
