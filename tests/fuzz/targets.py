"""What is given damaged files: for each door a seed, small and sound, and what a command does with it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import torch
from anndata import AnnData
from PIL import Image
from scipy import sparse

from genar import assess, settings
from genar.bench.recipe import read_recipe
from genar.data import contract, find_sections, open_slide, pyramid
from genar.data.patients import patient_in_table
from genar.data.reading import ReadOptions
from genar.data.slide import glance, image_head
from genar.data.tissue import place_spots
from genar.encoders.weights import read_state
from genar.evaluation import align, score_aligned
from genar.export import write_geojson
from genar.features import imports, stored
from genar.features.recipe import FeatureRecipe
from genar.features.store import new_store
from genar.genes import read_aliases, read_gene_sets, read_panel
from genar.models.checkpoint import load_checkpoint
from genar.report.index import write_report
from genar.report.sections import check_sections

_CHECKPOINT = Path(__file__).parent.parent / "data" / "checkpoint_format1"
_IMAGES = ("*.tif", "*.png", "*.jpg")


@dataclass(frozen=True)
class Target:
    """A door: ``seed`` writes sound files into a folder, ``enter`` reads a folder as a command would."""

    seed: Callable[[Path], object]
    enter: Callable[[Path], object]


def _section(n: int = 40, genes: int = 6) -> AnnData:
    rng = np.random.default_rng(0)
    adata = AnnData(sparse.csr_matrix(rng.poisson(2, (n, genes)).astype(np.float32)))
    adata.obs_names, adata.var_names = [f"S{i}" for i in range(n)], [f"GENE{i}" for i in range(genes)]
    adata.obs["array_row"], adata.obs["array_col"] = np.arange(n) // 8, 2 * (np.arange(n) % 8) + (np.arange(n) // 8) % 2
    adata.obsm["spatial"] = np.stack([np.arange(n) % 8, np.arange(n) // 8], axis=1) * 60.0 + 40
    scales = {"spot_diameter_fullres": 55.0, "tissue_hires_scalef": 0.1}
    adata.uns["spatial"] = {"lib": {"images": {"hires": np.full((4, 5, 3), 9, np.uint8)}, "scalefactors": scales}}
    return adata


def _predicted() -> AnnData:
    adata = _section()
    contract.new_section(adata, section="P1", mpp=1.0, spot_diameter_um=55, pitch_um=60, source="h5ad")
    adata.layers["mean"] = adata.X.toarray() + 0.5
    adata.layers["log1p_mean"] = np.log1p(adata.layers["mean"])
    adata.layers["p_zero"] = np.exp(-adata.layers["mean"])
    adata.uns["genar"]["prediction"] = {"model": "genar", "decode": "greedy", "samples": 4}
    return adata


def _read(work: Path, **options) -> None:
    for ref in find_sections(work):
        section = ref.read(ReadOptions(**options))
        contract.counts(section, list(section.var_names[:200]))
        contract.picture(section)


# --- sections


def seed_hest(folder: Path) -> None:
    for name in ("st", "wsis", "metadata"):
        (folder / name).mkdir(parents=True)
    _section().write_h5ad(folder / "st" / "A1.h5ad")
    tifffile.imwrite(
        folder / "wsis" / "A1.tif", np.full((400, 500, 3), 200, np.uint8), photometric="rgb", rowsperstrip=50
    )
    row = {
        "pixel_size_um_estimated": 1.0,
        "inter_spot_dist": 60.0,
        "spot_diameter": 55.0,
        "patient": "P",
        "simulated": False,
    }
    (folder / "metadata" / "A1.json").write_text(json.dumps(row))


def seed_h5ad(folder: Path) -> None:
    adata = _section()
    adata.layers["counts"] = adata.X.tocsc()
    adata.X = np.log1p(adata.X.toarray())
    adata.raw = adata
    adata.uns["genar"] = {
        "mpp": 1.0,
        "spot_diameter_um": 55.0,
        "pitch_um": 60.0,
        "patient": "P",
        "slide": "nowhere.tif",
    }
    adata.write_h5ad(folder / "A1.h5ad", compression="gzip")


def seed_visium(folder: Path, matrix: str, header: bool) -> None:
    from section_files import write_visium

    write_visium(folder / "P1", matrix=matrix, header=header)


def seed_visium_hd(folder: Path) -> None:
    from section_files import write_hd

    write_hd(folder / "H1", n=14)


def seed_legacy(folder: Path) -> None:
    from section_files import write_legacy

    write_legacy(folder)
    Image.new("RGB", (60, 60)).save(folder / "X1.jpg")


def seed_spatialdata(folder: Path) -> None:
    from section_files import write_spatialdata

    write_spatialdata(folder / "S1.zarr")


def enter_spatialdata(work: Path) -> None:
    for ref in find_sections(work):
        section = ref.read(ReadOptions(mpp=0.6))
        if path := contract.slide_path(section):
            _patches(path)


def seed_check(folder: Path) -> None:
    seed_hest(folder / "hest")
    recipe = FeatureRecipe("import:x", "imported", views=1)
    section = next(iter(find_sections(folder / "hest"))).read()
    new_store(folder / "features" / "A1-0123.zarr", section, recipe, 4, dtype="float32", rows_per_chunk=16)


def enter_check(work: Path) -> None:
    check_sections([str(work / "hest")], out=work / "out", features=work / "features")


# --- slides


def _pixels() -> np.ndarray:
    """Glass with a rough pink square on it, which passes for tissue."""
    image = np.full((600, 700, 3), 240, np.uint8)
    image[40:560, 40:660] = np.array([205, 120, 180]) + np.random.default_rng(0).integers(-40, 40, (520, 620, 1))
    return image


def seed_slides(folder: Path, kind: str) -> None:
    if kind == "pyramid":
        pyramid.write_pyramid(folder / "a.tif", _pixels(), 0.5)
    elif kind == "striped":
        tifffile.imwrite(folder / "a.tif", _pixels(), photometric="rgb", rowsperstrip=64, compression="deflate")
    elif kind == "flat":
        tifffile.imwrite(folder / "a.tif", _pixels(), photometric="rgb", resolution=(2e4, 2e4), resolutionunit=3)
    else:
        Image.fromarray(_pixels()).save(folder / f"a.{kind}")


def enter_slides(work: Path) -> None:
    for path in sorted(p for form in _IMAGES for p in work.glob(form)):
        _look(path)


def _look(path: Path) -> None:
    """All that is done with a slide; what one way refuses, the next is asked, too."""
    from genar.errors import InputError

    refusals = []
    for way in (image_head, lambda p: glance(p, 500), lambda p: place_spots(p, spacing_um=50, mpp=0.5), _patches):
        try:
            way(path)
        except InputError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def _patches(path: Path) -> None:
    slide = open_slide(path)
    slide.read_patch((100, 100), 112, 224, mpp=0.5)
    slide.read_patch((-50, 10**6), 112, 32, mpp=0.5)
    slide.thumbnail(300)
    slide.close()


# --- genes and settings


def seed_panels(folder: Path) -> None:
    from genar.genes import Panel

    Panel(("A", "B", "C"), "clean", ("S1",), 5).write(folder / "panel.json")
    (folder / "panel.txt").write_text("A\nB # b\nC\n")
    (folder / "aliases.txt").write_text("A X\nB\tY\n")
    (folder / "sets.gmt").write_text("S1\tabout\tA\tB\nS2\t\tC\n")
    (folder / "patients.csv").write_text("section,patient\nP1,Ann\nP2,Bea\n")


def enter_panels(work: Path) -> None:
    from genar.errors import InputError

    refusals = []
    for name, read in {
        "panel.json": read_panel,
        "panel.txt": read_panel,
        "aliases.txt": read_aliases,
        "sets.gmt": read_gene_sets,
        "patients.csv": lambda path: patient_in_table(path.parent, "P1"),
    }.items():
        try:
            read(work / name)
        except InputError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def seed_settings(folder: Path) -> None:
    facts = (
        "width: 64\nlr: 0.001\nscales: [1, 4, 8]\nwidths_um: [112, 224]\nlayers: [mean]\norder: kmeans\ntop_p: 0.9\n"
    )
    (folder / "config.yaml").write_text(facts)


def enter_settings(work: Path) -> None:
    from genar.training import train_config_from_dict

    found = settings.read_settings(work / "config.yaml", [])
    train_config_from_dict(found.train, "default")


RECIPE = """
title: x
sections: [A1, A2]
patients: {A1: P}
panel: genes.txt
encoder: efficientnet_lite0
seeds: [1, 2]
protocol: section
held_out: [A1]
methods:
  - {name: one, model: genar, set: {width: 64, scales: [2]}, held_out: [A1]}
  - {name: two, model: ridge}
compare:
  - [one, two]
tables: {main: [one], second: {rows: {a: one}, paper: '1'}}
figure: {genes: [A], methods: [one], section: A1}
groups: {genes: a.txt, groups: b.json}
paper: '1'
"""


def seed_recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "genes.txt").write_text("A\nB\n")


# --- models, features, predictions


def seed_checkpoints(folder: Path) -> None:
    shutil.copytree(_CHECKPOINT, folder / "genar")


def seed_rivals(folder: Path) -> None:
    from genar.genes import Panel
    from genar.models import Spots, model_class
    from genar.models.checkpoint import Checkpoint, save_checkpoint

    rng, n = torch.Generator().manual_seed(0), 24
    xy = torch.rand(n, 2, generator=rng)
    counts = torch.poisson(torch.full((n, 5), 3.0), generator=rng).long()
    where = torch.zeros(n, dtype=torch.int64)
    spots = Spots(torch.randn(n, 1, 8, generator=rng), xy * 1000, xy, torch.arange(n), where, counts)
    for name in ("ridge", "st_net", "bleep", "histogene"):
        model = model_class(name).create(8, spots, "small", {})
        model.prepare(spots)
        made = Checkpoint(name, model, Panel(tuple("ABCDE"), "clean"), {"encoder": "x", "width": 8}, {"best_epoch": 1})
        save_checkpoint(folder / name, made)


def enter_checkpoints(work: Path) -> None:
    from genar.errors import InputError

    refusals = []
    for folder in sorted(path for path in work.iterdir() if path.is_dir()):
        try:
            load_checkpoint(folder)
        except InputError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def _known() -> AnnData:
    adata = _section(16)
    return contract.new_section(adata, section="A1", mpp=1.0, spot_diameter_um=55, pitch_um=60, source="h5ad")


def seed_store(folder: Path) -> None:
    path = folder / "A1.zarr"
    group = new_store(
        path, _known(), FeatureRecipe("import:x", "imported", views=1), 4, dtype="float32", rows_per_chunk=8
    )
    group["features"][:] = np.ones((16, 1, 4), np.float32)


def enter_store(work: Path) -> None:
    stored.read_features(work / "A1.zarr", _known())


def seed_imports(folder: Path) -> None:
    import h5py

    features, section = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32), _known()
    (folder / "h5").mkdir(), (folder / "pt").mkdir(), (folder / "npy").mkdir()
    with h5py.File(folder / "h5" / "A1.h5", "w") as file:
        file["features"], file["coords"] = features, (contract.coords_px(section) - 28).astype(int)
        file["barcodes"] = np.array(section.obs_names, "S")
    torch.save(
        {"features": torch.from_numpy(features), "coords": torch.from_numpy(contract.coords_px(section) - 28)},
        folder / "pt" / "A1.pt",
    )
    np.save(folder / "npy" / "A1.npy", features)


def enter_imports(work: Path) -> None:
    from genar.errors import InputError

    refusals = []
    for name in ("h5/A1.h5", "pt/A1.pt", "npy/A1.npy"):
        try:
            imports.read_foreign_features(work / name, _known())
        except InputError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def seed_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    state = {"a.weight": torch.ones(4, 4), "a.bias": torch.zeros(4)}
    save_file(state, folder / "w.safetensors")
    torch.save(state, folder / "w.pt")
    torch.save(state, folder / "old.bin", _use_new_zipfile_serialization=False)


def enter_weights(work: Path) -> None:
    from genar.errors import InputError

    refusals = []
    for path in sorted(work.iterdir()):
        try:
            read_state(path)
        except InputError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def seed_prediction(folder: Path) -> None:
    _predicted().write_h5ad(folder / "p.h5ad", compression="gzip")


def enter_prediction(work: Path) -> None:
    truth = _predicted()
    predicted = assess.read_prediction(work / "p.h5ad")
    score_aligned(align(predicted, truth))
    write_geojson(predicted, work / "p.geojson")


def seed_run(folder: Path) -> None:
    (folder / "predictions").mkdir(), (folder / "checkpoint").mkdir()
    _predicted().write_h5ad(folder / "predictions" / "P1.h5ad")
    shutil.copy(_CHECKPOINT / "config.json", folder / "checkpoint" / "config.json")
    plan = {"sections": "nowhere", "mpp": None, "image": None, "bin_um": None}
    (folder / "run.json").write_text(
        json.dumps({"plan": plan, "command": "train", "seeds": [1], "versions": {"torch": "2"}})
    )
    (folder / "metrics.json").write_text(json.dumps({"P1": {"genar": {"pcc_200": 0.5}}}))


def enter_run(work: Path) -> None:
    write_report(work, work / "report.html", say=lambda line: None)


TARGETS: dict[str, Target] = {
    "hest": Target(seed_hest, _read),
    "h5ad": Target(seed_h5ad, _read),
    "visium": Target(lambda folder: seed_visium(folder, "h5", True), _read),
    "visium_mtx": Target(lambda folder: seed_visium(folder, "mtx", False), _read),
    "visium_hd": Target(seed_visium_hd, _read),
    "legacy_st": Target(seed_legacy, _read),
    "spatialdata": Target(seed_spatialdata, enter_spatialdata),
    "check": Target(seed_check, enter_check),
    "tiff_pyramid": Target(lambda folder: seed_slides(folder, "pyramid"), enter_slides),
    "tiff_striped": Target(lambda folder: seed_slides(folder, "striped"), enter_slides),
    "tiff_flat": Target(lambda folder: seed_slides(folder, "flat"), enter_slides),
    "png": Target(lambda folder: seed_slides(folder, "png"), enter_slides),
    "jpeg": Target(lambda folder: seed_slides(folder, "jpg"), enter_slides),
    "panels": Target(seed_panels, enter_panels),
    "settings": Target(seed_settings, enter_settings),
    "recipe": Target(seed_recipe, lambda work: read_recipe(str(work / "recipe.yaml"))),
    "checkpoint": Target(seed_checkpoints, enter_checkpoints),
    "rivals": Target(seed_rivals, enter_checkpoints),
    "features": Target(seed_store, enter_store),
    "imports": Target(seed_imports, enter_imports),
    "weights": Target(seed_weights, enter_weights),
    "prediction": Target(seed_prediction, enter_prediction),
    "run": Target(seed_run, enter_run),
}
