"""Spots that stay in files are the spots that memory would hold, and train what those would train."""

import gc
import weakref
from collections import Counter
from dataclasses import replace

import anndata
import h5py
import numpy as np
import pytest
import torch

from genar import defaults, inference, prediction, runs, streaming
from genar.data import SectionRef, contract
from genar.data.progress import no_bar
from genar.errors import InputError
from genar.features import FeatureRecipe, Inputs, StoredInputs, import_sections, read_inputs
from genar.features.store import new_store
from genar.genes import Panel
from genar.models import Decoding, Spots, model_class, model_names
from genar.models.checkpoint import Checkpoint, load_checkpoint
from genar.settings import Settings
from genar.streaming import CountFile, StoredSpots, StreamedLoader, count_moments, look_at
from genar.training import TrainConfig, fit, make_spots, split_validation

N_FEATURES, VIEWS, N_BATCHES = 6, 8, 7
TINY = {"width": 16, "depth": 1, "heads": 2, "components": 4, "max_count": 63}
ONE_EPOCH = TrainConfig(max_epochs=1, batch_size=16, warmup_steps=0, ema_decay=0)
SAMPLED = [name for name in model_names() if model_class(name).can_stream]
WHOLE = Inputs(context_spots=(3, 6))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK", 8)
    monkeypatch.setattr(streaming, "WINDOW", 3)
    monkeypatch.setattr(prediction, "_BLOCK", 12)


def values_of(section):
    """Features that say something of the counts."""
    random = np.random.default_rng(len(section))
    values = random.normal(size=(section.n_obs, VIEWS, N_FEATURES))
    values[:, :, 0] += np.log1p(section.obs[contract.LIBRARY_SIZE].to_numpy(float))[:, None]
    return values.astype(np.float16)


@pytest.fixture
def stores(tissue_sections, tmp_path):
    recipe, made = FeatureRecipe("none", ""), {}
    for section in tissue_sections:
        made[contract.name(section)] = path = tmp_path / f"{contract.name(section)}.zarr"
        group = new_store(path, section, recipe, N_FEATURES, dtype="float16", rows_per_chunk=4)
        group["features"][:] = values_of(section)
    return made


@pytest.fixture
def panel(tissue_sections):
    return Panel(tuple(tissue_sections[0].var_names[:20]), "given")


def stored_of(section, stores, inputs=Inputs()):  # noqa: B008
    return StoredInputs([stores[contract.name(section)]], section, inputs)


@pytest.fixture
def held(tissue_sections, panel):
    return Spots.join([make_spots(s, values_of(s).astype(np.float32), panel.genes) for s in tissue_sections])


@pytest.fixture
def stored(tissue_sections, stores, panel, tmp_path):
    nothing = [make_spots(s, np.zeros((s.n_obs, VIEWS, 0), np.float32)) for s in tissue_sections]
    counts = CountFile.write(tmp_path / "counts.i32", tissue_sections, panel.genes)
    return StoredSpots(Spots.join(nothing), [stored_of(s, stores) for s in tissue_sections], counts)


def same_spots(one, other):
    for name, value in vars(other).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(one, name), value), name


# -- reading --------------------------------------------------------------------------------------------------------


def test_rows_of_a_store_are_those_of_the_whole(tissue_sections, stores):
    section = tissue_sections[0]
    path = stores[contract.name(section)]
    for inputs in (WHOLE, Inputs(widths_um=(112, 224))):
        paths = [path] * max(1, len(inputs.widths_um))
        whole, part = read_inputs(paths, section, inputs), StoredInputs(paths, section, inputs)
        assert part.shape == whole.shape
        np.testing.assert_array_equal(part[5:19], whole[5:19])
        rows = np.array([0, 3, 4, section.n_obs - 1])
        np.testing.assert_array_equal(part[rows], whole[rows])


def test_files_hold_what_memory_would(stored, held):
    same_spots(stored.in_memory(), held)
    rows = torch.tensor([0, 1, 30, 31, 90, len(held) - 1])
    same_spots(stored.read(rows), held.rows(rows))
    some = torch.arange(3, len(held), 3)
    same_spots(stored.rows(some).read(torch.tensor([1, 4, 30])), held.rows(some[[1, 4, 30]]))
    same_spots(Spots.join(list(stored.rows(some).parts())), held.rows(some))
    assert torch.equal(torch.cat(list(stored.rows(some).counts_by_part())).long(), held.counts[some])


def test_moments_of_counts_are_those_of_all(stored, held):
    for streamed, whole in zip(count_moments(stored), count_moments(held), strict=True):
        torch.testing.assert_close(streamed, whole, rtol=1e-12, atol=1e-12)


def test_a_sample_is_spread_over_sections_and_knows_the_rest(stored, held):
    sample = stored.sample(30)
    assert len(sample) == len(sample.spot_ids.unique()) == 30
    shares = [(sample.section == s).sum() / (held.section == s).sum() for s in held.section.unique()]
    assert max(shares) < 1.2 * min(shares)
    same_spots(Spots.join(list(sample.parts())), held)
    same_spots(sample, held.sample(30))
    assert torch.equal(sample.largest_counts(), held.counts.amax(dim=0))
    assert held.sample(len(held)) is held


# -- an epoch -------------------------------------------------------------------------------------------------------


def shares_of(stored, *, seed=5, n_parts=1, rank=0, n_ranks=1, start=0):
    return list(StreamedLoader(stored, N_BATCHES, n_parts, lambda: seed, rank, n_ranks, start))


def by_spot(shares):
    return {int(i): (f, c) for s in shares for i, f, c in zip(s.batch.spot_ids, s.batch.features, s.batch.counts)}  # noqa: B905


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
@pytest.mark.parametrize("n_parts", [1, 2])
def test_batches_are_the_same_however_many_share_them(stored, held, n_ranks, n_parts):
    alone = shares_of(stored)
    assert sorted(i for s in alone for i in s.batch.spot_ids.tolist()) == sorted(held.spot_ids.tolist())
    shared = [shares_of(stored, n_parts=n_parts, rank=rank, n_ranks=n_ranks) for rank in range(n_ranks)]
    for step, whole in enumerate(alone):
        here = [share for own in shared for share in own[step * n_parts : (step + 1) * n_parts]]
        found, expected = by_spot(here), by_spot([whole])
        assert found.keys() == expected.keys()
        for spot, (features, counts) in expected.items():
            assert torch.equal(found[spot][0], features)
            assert torch.equal(found[spot][1], counts)
        mean = sum(s.weight * s.batch.spot_ids.double().mean() for s in here) / (n_parts * n_ranks)
        assert mean == pytest.approx(float(whole.batch.spot_ids.double().mean()))


def test_a_spot_comes_in_one_of_its_views_with_its_counts(stored, held):
    views = set()
    for spot, (features, counts) in by_spot(shares_of(stored)).items():
        (row,) = torch.nonzero(held.spot_ids == spot)[:, 0].tolist()
        ((view,),) = torch.nonzero((held.features[row] == features).all(dim=1)).tolist()
        views.add(view)
        assert torch.equal(counts, held.counts[row])
    assert views == set(range(VIEWS))


def test_an_epoch_goes_on_from_any_batch(stored):
    whole, rest = shares_of(stored), shares_of(stored, start=4)
    assert len(rest) == N_BATCHES - 4
    for one, other in zip(whole[4:], rest, strict=True):
        same_spots(one.batch, other.batch)
        assert one.weight == other.weight


def test_epochs_differ_and_repeat_by_their_seed(stored):
    ids = [[s.batch.spot_ids.tolist() for s in shares_of(stored, seed=seed)] for seed in (5, 5, 6)]
    assert ids[0] == ids[1] != ids[2]


def test_a_window_is_made_of_few_blocks_and_mixes_them(stored, tissue_sections):
    order = stored.epoch(torch.Generator().manual_seed(0))
    first = len(tissue_sections[0])
    blocks = torch.where(order < first, order // 8, 100 + (order - first) // 8)[: 3 * 8].unique_consecutive()
    assert len(blocks.unique()) <= 3 + 1  # a section's last block is short, so that another may begin
    assert len(blocks) > 6  # they are mixed
    assert sorted(order.tolist()) == list(range(len(stored)))


def test_a_damaged_store_stops_the_epoch(stored, stores, tissue_sections):
    import zarr

    path = stores[contract.name(tissue_sections[1])]
    zarr.open_group(path)["features"][3] = np.nan
    with pytest.raises(InputError, match="NaN"):
        shares_of(stored)


# -- training -------------------------------------------------------------------------------------------------------


def fitted(name, spots, config=ONE_EPOCH):
    cls = model_class(name)
    torch.manual_seed(0)
    settings = TINY if name == "genar" else {}
    model = cls.create(spots.n_features, look_at(cls, spots), "small" if name != "ridge" else "", settings)
    fit(model, spots, config)
    return model


@pytest.mark.parametrize("name", SAMPLED)
def test_what_a_model_is_prepared_with_is_the_same_from_files(name, stored, held):
    models = [fitted(name, spots, TrainConfig(max_epochs=0)) for spots in (stored, held)]
    one, other = (model.state_dict() for model in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", SAMPLED)
def test_models_train_from_files(name, stored):
    before, after = (fitted(name, stored, config) for config in (TrainConfig(max_epochs=0), ONE_EPOCH))
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert any(changed) == after.gradient
    again = fitted(name, stored)
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), again.parameters(), strict=True))


def test_models_that_keep_all_spots_take_them_into_memory(stored, held):
    one, other = (fitted("knn", spots) for spots in (stored, held))
    assert torch.equal(one.features, other.features)


@pytest.mark.parametrize("kind", ["stored", "held"])
def test_of_many_spots_sums_are_of_all(kind, stored, held, monkeypatch):
    """The sample chooses a penalty; what can be summed over all spots is."""
    spots = {"stored": stored, "held": held}[kind]
    whole = fitted("ridge", held)
    monkeypatch.setattr(streaming, "PREPARED_SPOTS", 40)
    ridge = fitted("ridge", spots)
    monkeypatch.setattr("genar.models.ridge.choose_penalty", lambda spots: float(ridge.penalty))
    monkeypatch.setattr(streaming, "PREPARED_SPOTS", 10**6)
    exact = fitted("ridge", held)
    for name in ("feature_mean", "feature_scale", "weight", "intercept"):
        torch.testing.assert_close(getattr(ridge, name), getattr(exact, name), rtol=1e-4, atol=1e-6)
    assert whole.weight.shape == ridge.weight.shape
    monkeypatch.setattr(streaming, "PREPARED_SPOTS", 40)
    torch.testing.assert_close(fitted("mean", spots).gene_mean, torch.log2(1 + held.counts.float()).mean(dim=0))
    wide = model_class("genar").create(N_FEATURES, look_at(ridge, spots), "small", {**TINY, "max_count": 0})
    assert wide.config.max_count >= held.counts.max()  # also of a count that the sample lacks


def test_validation_spots_are_no_training_spots(stored, held):
    parts, expected = split_validation(stored, 0.2), split_validation(held, 0.2)
    for one, other in zip(parts, expected, strict=True):
        same_spots(one.in_memory(), other)
    summary = fitted("genar", stored, TrainConfig(max_epochs=1, validation_share=0.2, validate_every=1))
    assert summary is not None


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tissue, tissue_sections, tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "RESAMPLES", 10)
    for section in tissue_sections:
        np.save(tmp_path / f"{contract.name(section)}.npy", values_of(section)[:, 0].astype(np.float32))
    import_sections(tissue_sections, tmp_path, "made", tmp_path / "store")

    def made(out, **settings):
        train = {"max_epochs": 1, "batch_size": 16}
        own = {"encoder": "import:made", "features": tmp_path / "store", "n_genes": 20, "maps": False}
        settings = Settings(model=TINY, train=train, decoding={"samples": 2}, **settings)
        return runs.TrainPlan(tissue, ("SIM2",), tmp_path / out, settings=settings, **own)

    return made


def test_a_streamed_run_scores_as_one_in_memory(plan, monkeypatch):
    said = []
    whole = runs.train_run(plan("whole"), say=lambda line: None)
    monkeypatch.setattr(streaming, "IN_MEMORY_BYTES", 0)
    streamed = runs.train_run(plan("streamed"), say=said.append)
    assert any("streamed from the feature stores" in line for line in said)
    one, other = (run.scores["SIM2"] for run in (whole, streamed))
    for method in ("ridge", "mean"):
        assert one[method].summary == pytest.approx(other[method].summary, nan_ok=True)
    assert other["genar_mean"].summary["mse"] == pytest.approx(one["genar_mean"].summary["mse"], rel=0.2)
    assert not (streamed.outputs["checkpoint"].parent / "resume").exists()


@pytest.mark.parametrize("section", ["SIM1", "SIM2"])
def test_a_damaged_store_is_refused_before_training(plan, section, tmp_path):
    import zarr

    (path,) = (tmp_path / "store").glob(f"{section}-*.zarr")
    zarr.open_group(path)["features"][7] = np.nan
    said = []
    with pytest.raises(InputError, match="NaN"):
        runs.train_run(plan("run"), say=said.append)
    assert not any(line.startswith("training") for line in said)


def contents(path):
    """Every group and dataset of a file: its attributes, type, shape and values."""
    found = {}

    def plain(values):
        values = np.asarray(values)
        return values.tolist() if values.dtype.hasobject else (values.dtype, values.shape, values.tobytes())

    def look(name, item):
        attributes = {key: plain(value) for key, value in item.attrs.items()}
        found[name] = (attributes, plain(item[()]) if isinstance(item, h5py.Dataset) else None)

    with h5py.File(path) as file:
        file.visititems(look)
    return found


# -- predictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["genar", "ridge", "mean", "histogene"])
def test_a_file_written_in_blocks_reads_as_one_written_whole(name, held, stores, panel, tissue_sections, tmp_path):
    model = fitted(name, held, TrainConfig(max_epochs=0))
    checkpoint = Checkpoint(name, model, panel, {}, {contract.TRAINING_MEAN: [1.0] * 20})
    section = tissue_sections[1]
    how = Decoding(checkpoint.model.decodings[0], samples=2, layers=("mean", "sd", "log1p_mean"))
    section.uns["spatial"] = {"SIM": {"images": {}, "scalefactors": {"spot_diameter_fullres": 4.0}}}
    features, whole, blocks = stored_of(section, stores), tmp_path / "whole.h5ad", tmp_path / "blocks.h5ad"
    prediction.write_prediction(prediction.predict_section(checkpoint, section, features[:], how, batch_size=12), whole)
    seen = []
    prediction.predict_to_file(
        checkpoint,
        section,
        features,
        blocks,
        how,
        batch_size=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (section.n_obs, section.n_obs)
    assert contents(blocks) == contents(whole)
    assert anndata.read_h5ad(blocks).layers["log1p_mean"].dtype == np.float32
    assert anndata.read_h5ad(blocks, backed="r").shape == (section.n_obs, 20)


def test_a_prediction_that_breaks_leaves_no_file(held, stores, panel, tissue_sections, tmp_path):
    import zarr

    section = tissue_sections[1]
    checkpoint = Checkpoint("ridge", fitted("ridge", held), panel, {})
    zarr.open_group(stores[contract.name(section)])["features"][section.n_obs - 1] = np.nan
    with pytest.raises(InputError, match="NaN"):
        prediction.predict_to_file(checkpoint, section, stored_of(section, stores), tmp_path / "out" / "pred.h5ad")
    assert not list((tmp_path / "out").iterdir())


def test_features_of_other_spots_are_refused(held, stores, panel, tissue_sections):
    checkpoint = Checkpoint("ridge", fitted("ridge", held), panel, {})
    with pytest.raises(InputError, match=r"features of \d+ spots, 10 expected"):
        prediction.predict_section(checkpoint, tissue_sections[1][:10].copy(), stored_of(tissue_sections[1], stores))


def test_a_large_prediction_is_streamed_by_the_command(plan, tissue_sections, monkeypatch, tmp_path):
    run = runs.train_run(plan("run"), say=lambda line: None)
    made = {}
    for name, bound in (("whole", 2**29), ("blocks", 0)):
        monkeypatch.setattr(inference, "STREAMED_BYTES", bound)
        path = tmp_path / f"{name}.h5ad"
        predicted = inference.predict_run(
            tissue_sections[1], load_checkpoint(run.outputs["checkpoint"]), path,
            features=tmp_path / "store", how={"samples": 2},
        )  # fmt: skip
        assert predicted.isbacked == (name == "blocks")
        made[name] = contents(path)
    assert made["whole"] == made["blocks"]


# -- sections as training keeps them --------------------------------------------------------------------------------


def test_training_keeps_of_a_section_what_it_needs(tissue_sections):
    section = tissue_sections[0]
    genes = list(section.var_names[5:9])
    cut = contract.cut(section, genes)
    np.testing.assert_array_equal(contract.counts(cut, genes), contract.counts(section, genes))
    np.testing.assert_array_equal(contract.coords_px(cut), contract.coords_px(section))
    assert contract.name(cut) == contract.name(section)
    assert "spatial" in section.uns
    assert list(cut.uns) == ["genar"]
    assert contract.cut(cut, genes) is cut
    assert set(contract.cut(section, genes, images=True).uns) == {"genar", "spatial"}
    with pytest.raises(InputError, match="1 of 2 panel genes missing"):
        contract.cut(section, [genes[0], "NOSUCH"])


def test_all_genes_of_a_section_are_gone_with_it(tissue_sections):
    """At once, not when Python next looks for what holds itself: sections are read faster than that."""
    section = tissue_sections[0].copy()
    counts, genes = weakref.ref(section.X), list(section.var_names[5:9])
    gc.disable()
    try:
        contract.counts(section, genes), contract.values(section, genes)
        kept = contract.cut(section, genes)
        del section
        assert counts() is None
        few = weakref.ref(kept.X)
        assert contract.cut(kept, []).n_obs == kept.n_obs
        del kept
        assert few() is None
    finally:
        gc.enable()


def test_after_its_spots_are_made_a_run_holds_no_counts_of_sections(plan, monkeypatch):
    held, fit = [], runs.fit
    read = contract.cut

    def cut(section, genes, **more):
        made = read(section, genes, **more)
        if not more:  # of training
            held.append(weakref.ref(made.X))
        return made

    def look(*args, **kwargs):
        assert any(x() is not None and x().shape[1] for x in held) is False
        return fit(*args, **kwargs)

    monkeypatch.setattr(contract, "cut", cut)
    monkeypatch.setattr(runs, "fit", look)
    assert runs.train_run(plan("run"), say=lambda line: None).outputs["run"].is_file()
    assert held


def test_a_panel_from_a_file_leaves_nothing_else_in_memory(plan, tissue_sections, tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("\n".join(tissue_sections[0].var_names[:20]))
    given = replace(plan("run"), panel=str(tmp_path / "list.txt"), n_genes=None)
    training, held_out, _, digests = runs._read(given, lambda line: None, no_bar)
    assert [section.n_vars for section in (*training, *held_out)] == [20, 20]
    assert digests == {contract.name(section): contract.digest(section) for section in tissue_sections}


def test_a_panel_is_selected_by_a_run_that_holds_no_section_as_by_one_that_holds_all(plan, monkeypatch):
    whole = runs.train_run(plan("whole"), say=lambda line: None)
    monkeypatch.setattr(runs, "HELD_BYTES", 0)
    read, n_read = SectionRef.read, Counter()

    def counted(ref, *args, **kwargs):
        n_read[ref.id] += 1
        return read(ref, *args, **kwargs)

    monkeypatch.setattr(SectionRef, "read", counted)
    again = runs.train_run(plan("again"), say=lambda line: None)
    assert n_read == {"SIM1": 4, "SIM2": 2}  # the check, two rounds of the selection, the cut; the check, the cut
    assert whole.outputs["panel"].read_bytes() == again.outputs["panel"].read_bytes()
    assert contents(whole.outputs["prediction SIM2"]) == contents(again.outputs["prediction SIM2"])
