"""Features of patches: views, stores that go on or are damaged, and what a model sees of them."""

import json
import shutil
from dataclasses import replace
from itertools import product

import anndata
import numpy as np
import pytest
import torch
from anndata import AnnData
from PIL import Image
from torch import nn

from genar import encoders, features
from genar.data import contract, open_slide, read_section
from genar.data.simulate import TissueConfig, write_tissue
from genar.encoders import Encoder, EncoderRow, load_encoder
from genar.errors import InputError
from genar.features import Inputs, default_store, embed, read_features, read_inputs, recipe_of, store_path

ROW = EncoderRow("tiny", "none", "", 8, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "MIT")


class CountingEncoder(Encoder):
    n_patches = 0

    def __call__(self, patches):
        self.n_patches += len(patches)
        return super().__call__(patches)


def tiny_encoder():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 5, stride=3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    return CountingEncoder(ROW, nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


@pytest.fixture
def encoder():
    return tiny_encoder()


def read_spots(tissue):
    return read_section(f"{tissue}:SIM1")[::3].copy()  # 20 spots: a whole chunk and a part of one


@pytest.fixture
def section(tissue):
    return read_spots(tissue)


@pytest.mark.parametrize("views", [1, 8])
def test_store_holds_every_spot_view_and_feature(section, encoder, tmp_path, views):
    recipe = recipe_of(encoder, views=views)
    steps = []
    path = embed(section, encoder, recipe, tmp_path, progress=lambda done, total: steps.append((done, total)))
    features = read_features(path, section)
    assert features.shape == (section.n_obs, views, 8)
    assert features.dtype == np.float32
    assert path == store_path(section, recipe, tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert encoder.n_patches == section.n_obs * views
    assert steps[0] == (0, section.n_obs)
    assert steps[-1] == (section.n_obs, section.n_obs)
    assert steps == sorted(steps)


def upright(section, encoder, spots=slice(None)):
    slide = open_slide(contract.slide_path(section))
    centers = contract.coords_px(section)[spots]
    mpp = contract.mpp(section)
    patches = [slide.read_patch(center, 112, encoder.row.input_px, mpp=mpp) for center in centers]
    slide.close()
    return np.stack(patches)


def test_view_0_is_the_upright_patch_and_rows_are_the_spots(section, encoder, tmp_path):
    features = read_features(embed(section, encoder, recipe_of(encoder), tmp_path), section)
    expected = encoder(upright(section, encoder)).numpy()
    np.testing.assert_allclose(features[:, 0], expected, atol=2e-3)
    assert np.std(expected, axis=0).max() > 0.01  # spots differ by more than the tolerance


def test_one_view_is_the_first_of_eight(section, encoder, tmp_path):
    one, eight = (
        read_features(embed(section, encoder, recipe_of(encoder, views=n), tmp_path), section) for n in (1, 8)
    )
    np.testing.assert_array_equal(one[:, 0], eight[:, 0])


def make_section(folder, image, centers, name):
    path = folder / f"{name}.png"
    Image.fromarray(image).save(path)
    adata = AnnData(np.ones((len(centers), 2), np.float32))
    adata.obsm["spatial"] = np.asarray(centers, dtype=float)
    return contract.new_section(adata, section=name, slide=path, mpp=1.0, spot_diameter_um=20, source="test")


@pytest.mark.parametrize("turn", ["rot90", "mirror"])
def test_views_of_a_turned_patch_are_the_same_eight(encoder, tmp_path, turn):
    image = np.random.default_rng(0).integers(0, 255, (12, 10, 3), np.uint8).repeat(10, axis=0).repeat(10, axis=1)
    image = np.ascontiguousarray(image[:, :96])
    width = image.shape[1]
    centers = np.array([(30, 40), (60, 70), (50, 90)])
    x, y = centers.T
    if turn == "rot90":
        turned, centers_turned = np.rot90(image), np.stack([y, width - x], axis=1)
    else:
        turned, centers_turned = image[:, ::-1], np.stack([width - x, y], axis=1)
    recipe = recipe_of(encoder, width_um=32)
    here, there = (
        read_features(embed(s, encoder, recipe, tmp_path), s)
        for s in (
            make_section(tmp_path, image, centers, "upright"),
            make_section(tmp_path, np.ascontiguousarray(turned), centers_turned, "turned"),
        )
    )
    for ours, theirs in zip(here, there, strict=True):
        distance = np.abs(ours[:, None] - theirs).max(axis=2)
        assert sorted(distance.argmin(axis=1)) == list(range(8))
        assert distance.min(axis=1).max() < 1e-3
        among = np.abs(ours[:, None] - ours).max(axis=2) + np.eye(8)
        assert among.min() > 2e-3  # the eight views differ
        assert distance[0, 0] > 2e-3  # and view 0 is not the same one


def test_second_call_encodes_nothing(section, encoder, tmp_path):
    recipe = recipe_of(encoder)
    path = embed(section, encoder, recipe, tmp_path)
    encoder.n_patches = 0
    assert embed(section, encoder, recipe, tmp_path) == path
    assert encoder.n_patches == 0


def arrays(path, section):
    return read_features(path, section).tobytes()


@pytest.fixture(scope="module")
def undisturbed(tissue, tmp_path_factory):
    section, encoder = read_spots(tissue), tiny_encoder()
    return arrays(embed(section, encoder, recipe_of(encoder), tmp_path_factory.mktemp("whole")), section)


class Killed(Exception):  # noqa: N818
    pass


def embed_until(n_spots, section, encoder, store):
    def stop(done, total):
        if done >= n_spots:
            raise Killed

    with pytest.raises(Killed):
        embed(section, encoder, recipe_of(encoder), store, progress=stop)


@pytest.mark.parametrize("stops", [(1,), (0, 1, 17)])
def test_interrupted_run_goes_on_where_it_stopped(section, encoder, tmp_path, undisturbed, stops):
    store = tmp_path / "resumed"
    for n_spots in stops:
        embed_until(n_spots, section, encoder, store)
        assert not store_path(section, recipe_of(encoder), store).exists()
    path = embed(section, encoder, recipe_of(encoder), store)
    assert encoder.n_patches == section.n_obs * 8
    assert arrays(path, section) == undisturbed
    assert list(store.iterdir()) == [path]


@pytest.mark.parametrize("cut", ["attributes", "group", "array", "half a file", "everything"])
def test_partial_store_cut_while_created_is_made_anew(section, encoder, tmp_path, undisturbed, cut):
    store = tmp_path / "cut"
    embed_until(1, section, encoder, store)
    partial = store_path(section, recipe_of(encoder), store).with_suffix(".partial")
    group = partial / "zarr.json"
    if cut == "attributes":
        group.write_text(json.dumps({**json.loads(group.read_text()), "attributes": {}}))
    elif cut == "group":
        group.unlink()
    elif cut == "array":
        shutil.rmtree(partial / "features")
    elif cut == "half a file":
        group.write_text(group.read_text()[:50])
    else:
        shutil.rmtree(partial)
        partial.mkdir()
    encoder.n_patches = 0
    path = embed(section, encoder, recipe_of(encoder), store)
    assert encoder.n_patches == section.n_obs * 8
    assert arrays(path, section) == undisturbed


def shifted(section):
    section.obsm["spatial"] = contract.coords_px(section) + 1
    return section


def renamed(section):
    section.obs_names = [f"x{name}" for name in section.obs_names]
    return section


def test_what_differs_is_another_store(section, encoder, tissue_sections, tmp_path):
    recipe = recipe_of(encoder)
    other_slide, coarser = section.copy(), section.copy()
    other_slide.uns[contract.GENAR][contract.SLIDE] = tissue_sections[1].uns[contract.GENAR][contract.SLIDE]
    coarser.uns[contract.GENAR][contract.MPP] = 0.9
    variants = [
        (section, recipe),
        *((section, replace(recipe, **change)) for change in (
            {"views": 1}, {"width_um": 309.0}, {"patch": "genar"}, {"encoder": "other"}, {"weights_sha256": "0"},
        )),
        *((other, recipe) for other in (
            tissue_sections[1], other_slide, coarser, shifted(section.copy()), renamed(section.copy()), section[::-1],
        )),
    ]  # fmt: skip
    paths = {store_path(s, r, tmp_path) for s, r in variants}
    assert len(paths) == len(variants)
    assert store_path(section.copy(), replace(recipe), tmp_path) in paths


def test_changed_slide_file_is_another_store(section, encoder, tmp_path):
    slide = tmp_path / "slide.tif"
    shutil.copy(contract.slide_path(section), slide)
    section.uns[contract.GENAR][contract.SLIDE] = str(slide)
    before = store_path(section, recipe_of(encoder), tmp_path)
    with slide.open("ab") as file:
        file.write(b"x")
    assert store_path(section, recipe_of(encoder), tmp_path) != before


@pytest.mark.parametrize("change", [lambda s: s[::-1], lambda s: s[:-1], renamed])
def test_rows_that_are_not_the_spots_are_refused(section, encoder, tmp_path, change):
    path = embed(section, encoder, recipe_of(encoder, views=1), tmp_path)
    with pytest.raises(InputError, match=r"rows are not the \d+ spots of section SIM1"):
        read_features(path, change(section.copy()))


def damage_nothing_left(path):
    shutil.rmtree(path)


def damage_group(path):
    (path / "zarr.json").unlink()


def damage_json(path):
    (path / "features" / "zarr.json").write_text("{")


def damage_array(path):
    shutil.rmtree(path / "features")


def damage_barcodes(path):
    shutil.rmtree(path / "barcode")


def damage_lengths(path):
    """Without the step that unpacks them, packed names begin with what is no length."""
    facts = json.loads((path / "barcode" / "zarr.json").read_text())
    facts["codecs"] = [codec for codec in facts["codecs"] if codec["name"] == "vlen-utf8"]
    (path / "barcode" / "zarr.json").write_text(json.dumps(facts))


def first_chunk(path):
    return next(file for file in sorted((path / "features" / "c").rglob("*")) if file.is_file())


def damage_chunk(path):
    first_chunk(path).write_bytes(b"\x00" * 50)


def truncate_chunk(path):
    chunk = first_chunk(path)
    chunk.write_bytes(chunk.read_bytes()[:40])


def lose_chunk(path):
    first_chunk(path).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_nothing_left,
        damage_group,
        damage_json,
        damage_array,
        damage_barcodes,
        damage_lengths,
        damage_chunk,
        truncate_chunk,
        lose_chunk,
    ],
)
def test_damaged_store_is_refused(section, encoder, tmp_path, damage):
    path = embed(section, encoder, recipe_of(encoder, views=1), tmp_path)
    damage(path)
    with pytest.raises(InputError, match=r"delete it and embed again|no such file; expected a feature store"):
        read_features(path, section)


def test_spots_outside_the_image_are_refused(section, encoder, tmp_path):
    section.obsm["spatial"] = contract.coords_px(section) * 3
    with pytest.raises(InputError, match=r"section SIM1: .* lie outside the image of 1257 x 1257 px"):
        embed(section, encoder, recipe_of(encoder), tmp_path)
    assert not list(tmp_path.iterdir())


def test_section_without_image_is_refused_unless_its_store_is_there(section, encoder, tmp_path):
    section.uns[contract.GENAR][contract.SLIDE] = ""
    with pytest.raises(InputError, match="SIM1: no slide image"):
        embed(section, encoder, recipe_of(encoder), tmp_path)


def test_unencodable_values_are_refused(section, tmp_path):
    class Huge(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :8].abs() * 1e6 + 1e5  # beyond float16

    encoder = Encoder(ROW, Huge())
    with pytest.raises(InputError, match="beyond 65504"):
        embed(section, encoder, recipe_of(encoder, views=1), tmp_path)
    assert list(tmp_path.glob("*.zarr")) == []


def test_default_store_is_the_environments(monkeypatch, tmp_path):
    monkeypatch.setenv("GENAR_FEATURES", str(tmp_path / "here"))
    assert default_store() == tmp_path / "here"
    monkeypatch.delenv("GENAR_FEATURES")
    assert default_store().name == "features"


def test_batch_size_never_changes_the_embedded_encoders_features(section):
    lite0 = load_encoder()
    patches = upright(section, lite0, slice(8))
    together = lite0(patches)
    assert together.shape == (8, 1280)
    apart = torch.cat([lite0(patch[None]) for patch in patches])
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-4)
    differences = [(together[i] - together[j]).abs().max() for i, j in product(range(8), repeat=2) if i < j]
    assert min(differences) > 1e-2


# -- what a model sees of them --------------------------------------------------------------------------------------


def test_inputs_are_widths_and_neighbours_means(section, encoder, tmp_path):
    inputs = Inputs(widths_um=(112, 300), context_spots=(2, 6))
    recipes = inputs.recipes(recipe_of(encoder))
    assert [recipe.width_um for recipe in recipes] == [112, 300]
    paths = [embed(section, encoder, recipe, tmp_path) for recipe in recipes]
    assert paths[0] != paths[1]
    seen = read_inputs(paths, section, inputs)
    own, wide = (read_features(path, section) for path in paths)
    assert seen.shape == (section.n_obs, 8, inputs.n_blocks * encoder.width)
    np.testing.assert_array_equal(seen[:, :, :8], own)
    np.testing.assert_array_equal(seen[:, :, 8:16], wide)
    distance = np.linalg.norm(section.obsm["spatial"][5] - section.obsm["spatial"], axis=1)
    nearest = np.argsort(distance)[1:7]
    np.testing.assert_allclose(seen[5, :, 24:], wide[nearest].mean(axis=0), rtol=1e-5)


def test_a_lone_spot_is_its_own_neighbour(section, encoder, tmp_path):
    lone = section[:1].copy()
    path = embed(lone, encoder, recipe_of(encoder), tmp_path)
    seen = read_inputs([path], lone, Inputs(context_spots=(6,)))
    np.testing.assert_array_equal(seen[:, :, 8:], seen[:, :, :8])


def test_patches_of_bare_glass_are_told(tmp_path):
    write_tissue(tmp_path, ("A",), config=TissueConfig(n_rows=6, n_cols=6, n_genes=80, counts_per_nucleus=20))
    path = tmp_path / "st" / "A.h5ad"
    adata = anndata.read_h5ad(path)
    adata.obsm[contract.SPATIAL] = adata.obsm[contract.SPATIAL] / 40
    adata.write_h5ad(path)
    encoder = encoders.load_encoder()
    recipe = features.recipe_of(encoder, views=1, width_um=60.0)
    with pytest.warns(UserWarning, match=r"[0-9]+ of [0-9]+ patches show hardly anything; do coordinates"):
        features.embed(read_section(path), encoder, recipe, tmp_path / "store")
