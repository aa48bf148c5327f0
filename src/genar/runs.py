"""Training runs: from a folder of sections to a scored prediction; the command line only calls them."""

import contextlib
import gc
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from anndata import AnnData
from torch import Tensor

import genar
from genar import defaults, encoders, machine, pixels, processes, streaming
from genar.assess import write_intervals
from genar.data import contract, find_sections, options_for, pick, reading
from genar.data.files import LOCK, alone, json_ready, write_text
from genar.data.progress import Bar, counted, no_bar
from genar.data.sections import HELD_BYTES, Sections
from genar.errors import InputError, named
from genar.evaluation import Aligned, Scores, align, align_both, intervals, score_aligned, write_scores
from genar.evaluation.protocol import shared_patients_note
from genar.features import (
    FeatureRecipe,
    StoredInputs,
    check_source,
    default_store,
    embed_sections,
    imported_sha256,
    recipe_of,
)
from genar.genes import (
    Panel,
    gene_sets_of,
    leak_note,
    order_by_sets,
    read_panel,
    select_panel,
)
from genar.models import Decoding, Model, Spots, model_class
from genar.models._lattice import Lattice
from genar.models.checkpoint import Checkpoint, rewrite_card, save_checkpoint
from genar.prediction import decoding, predict_section, unused_note, write_prediction
from genar.report import maps
from genar.streaming import AnySpots, CountFile, StoredSpots, count_moments, look_at
from genar.train_plan import TrainPlan, claim_resume
from genar.training import FitSummary, TrainConfig, fit, make_spots, split_validation, train_config_from_dict


@dataclass
class RunResult:
    """Where things lie and what came out."""

    outputs: dict[str, Path]
    """name -> file or folder"""
    scores: dict[str, dict[str, Scores]]
    """held-out section -> method -> scores"""
    seconds: dict[str, float]
    """stage -> time"""


def train_run(
    plan: TrainPlan, *, say: Callable[[str], None] = print, bar: Bar = no_bar, progress: bool = False
) -> RunResult:
    """Read, select the panel, embed, fit, predict the held-out sections, score them beside ``mean`` and ``ridge``,
    draw maps.

    Nothing of a held-out section reaches the panel, the gene order, a constant or the choice of an epoch. A run that
    was interrupted goes on from its last resume file when it is started again with the same plan, and ends in the same
    bits. Raises ``InputError`` for bad input, before the long work starts where that can be known, and where another
    run is at work in ``plan.out``; ``StoppedError`` as ``training.fit`` does.
    """
    with contextlib.nullcontext() if processes.rank() else alone(plan.out, "training run"):
        result = _train(plan, say, bar, progress)
        if result.outputs:  # only now: the spots were read from files in there, and some systems remove no open one
            gc.collect()  # Lightning's loop and its module hold each other
            shutil.rmtree(plan.out / "resume", ignore_errors=True)
        return result


def _train(plan: TrainPlan, say: Callable[[str], None], bar: Bar, progress: bool) -> RunResult:
    clock = machine.Clock()
    cls = model_class(plan.model)
    group, rank = processes.group(plan.devices, plan.num_nodes), processes.rank()
    machine.check_devices(plan.device, group.devices)
    config = train_config_from_dict(plan.settings.train, plan.recipe, cls.train_defaults)
    how = decoding(cls, plan.settings.decoding)
    model_settings = pixels.input_settings(plan.input, plan.model, plan.preset, plan.settings.model, plan.inputs)
    model_settings, sets = gene_sets_of(model_settings)
    cls.check_settings(plan.preset, model_settings)
    cls.check_decoding(plan.preset, model_settings, how)
    for unused in _unused(plan, cls, config, model_settings):
        say(f"note: {unused}")
    if (plan.out / "run.json").exists():
        tidy(plan.out)
        raise InputError(f"{plan.out}: holds a finished run already; choose another --out, or delete it first")
    training, held_out, panel, digests = _read(plan, say, bar)
    order = order_by_sets(panel.genes, sets) if sets is not None else None
    if order is not None:
        model_settings["order"] = order
    cls.check_settings(plan.preset, model_settings, len(panel.genes))
    resume = claim_resume(plan, data=digests, panel=panel.sha256, order=order)
    panel.write(plan.out / "panel.json")
    clock.lap("read")

    say(f"{plan.input} of {len(training) + len(held_out)} sections: made where they are not stored")
    see = _seen_as_pixels if plan.input == "patches" else _embedded
    seen = see(plan, training, held_out, bar)
    claim_resume(plan, data=digests, panel=panel.sha256, order=order, features=seen.facts, **seen.imported)
    clock.lap(plan.input)

    spots = _training_spots(plan, training, seen, panel, resume)
    training = [contract.cut(section, []) for section in training]  # their counts are those of the spots now
    streamed = ", streamed from the feature stores" if isinstance(spots, StoredSpots) else ""
    of = "a section" if len(training) == 1 else f"{len(training)} sections"
    say(f"training {plan.model} on {len(spots)} spots of {of}, {len(panel.genes)} genes{streamed}")
    torch.manual_seed(config.seed)
    # the order of genes is learnt, too; a model that is fitted at once chooses no epoch, and learns from all
    learnt_from, held = split_validation(spots, config.validation_share if cls.gradient else 0)
    if config.validation_share and cls.gradient and held is None:
        say(f"note: no section has spots enough for a strip of {config.validation_share:g}: no epoch is chosen")
    model = cls.create(spots.n_features, look_at(cls, learnt_from), plan.preset, model_settings)
    summary = fit(model, spots, config, folder=resume, log=say, progress=progress, group=group, device=plan.device)
    if rank:
        return RunResult({}, {}, {})  # the first process writes and scores
    facts = _training_facts(plan, config, training, held_out, spots, summary)
    checkpoint = Checkpoint(plan.model, model, panel, seen.facts, facts)
    outputs = {"checkpoint": save_checkpoint(plan.out / "checkpoint", checkpoint), "panel": plan.out / "panel.json"}
    if cost := model.cost(sum(section.n_obs for section in held_out), how):
        say(cost)
    clock.lap("training")

    model.to(machine.of_models(plan.device))
    scores = _predict_and_score(plan, checkpoint, how, spots, held_out, seen, outputs, bar, say)
    if summary.history and plan.maps:
        path = plan.out / "maps" / "training.png"
        outputs["training curve"] = maps.write_training_curve(summary.history, summary.best_epoch, path)
    clock.lap("prediction, scores and maps")
    _write_run(plan, config, how, checkpoint, digests, seen.stores, clock)
    outputs["run"] = plan.out / "run.json"
    return RunResult(outputs, scores, clock.seconds)


def _unused(plan: TrainPlan, cls: type[Model], config: TrainConfig, model_settings: dict) -> Iterator[str]:
    """What to say of settings that the user gave and that this training does not use."""
    for name, why in cls.idle_settings(plan.preset, model_settings).items():
        yield f"model {plan.model}: {name} does nothing with {why}"
    if plan.settings.decoding and not plan.test:
        yield f"nothing is predicted without --test: {', '.join(plan.settings.decoding)} are for `genar predict`"
    if cls.compares and processes.group(plan.devices, plan.num_nodes).size > 1:
        yield f"model {plan.model} compares the spots of a batch, each process its share's: it learns another thing"
    if not cls.gradient:
        names = [*plan.settings.train, *(["recipe"] if plan.recipe != defaults.RECIPE else [])]
        if names:
            yield f"model {plan.model} is fitted at once, and does not use {', '.join(names)}"
        return
    names = [name for name in ("validate_every", "patience", "validation_samples") if name in plan.settings.train]
    if names and not config.validation_share:
        yield f"nothing is held out to choose the epoch on (validation_share 0): {', '.join(names)} are not used"
    if cls.unit == "section" and "batch_size" in plan.settings.train:
        yield f"model {plan.model} takes a section a step, and does not use batch_size"


def tidy(out: Path) -> None:
    """Remove what a run that was killed between its last file and its end left beside it."""
    shutil.rmtree(out / "resume", ignore_errors=True)
    with contextlib.suppress(OSError):
        (out / LOCK).unlink(missing_ok=True)


def _training_spots(plan: TrainPlan, training, seen: "_Seen", panel: Panel, folder: Path) -> AnySpots:
    """All in memory where they fit or the model needs them so, else left in their files; counts then go to
    ``folder``."""
    n_blocks, stored = plan.inputs.n_blocks, [seen.features[contract.name(section)] for section in training]
    n_bytes = 4 * sum(math.prod(part.shape) for part in stored)
    if n_bytes <= streaming.IN_MEMORY_BYTES or not model_class(plan.model).can_stream:
        parts = [make_spots(s, f[:], panel.genes, n_blocks=n_blocks) for s, f in zip(training, stored, strict=True)]
        return replace(Spots.join(parts), patches=seen.training_patches)
    places = Spots.join([make_spots(s, pixels.no_features(s.n_obs), n_blocks=n_blocks) for s in training])
    path = folder / processes.own_folder() / "counts.i32"
    return StoredSpots(places, stored, CountFile.write(path, training, panel.genes))


def _predict_and_score(
    plan: TrainPlan, checkpoint: Checkpoint, how: Decoding, spots: AnySpots, held_out, seen: "_Seen", outputs, bar, say
) -> dict[str, dict[str, Scores]]:
    """Predict and score the held-out sections beside the baselines; what is written goes into ``outputs``."""
    beside = [name for name in plan.beside if name != plan.model and (plan.input == "features" or name == "mean")]
    rivals = {name: _baseline(name, spots, checkpoint) for name in beside}
    for rival in rivals.values():
        rival.model.to(checkpoint.model.device)
    scores: dict[str, dict[str, Scores]] = {}
    found = {}
    for section in held_out:
        name = contract.name(section)
        with bar(f"predicting {name}", section.n_obs) as tick:
            predicted = predict_section(
                checkpoint, section, seen.features[name], how, patches=seen.patches.get(name), progress=tick
            )
        asked = plan.settings.decoding
        if section is held_out[0] and (note := unused_note(checkpoint.model, how, asked, predicted.layers)):
            say(note)
        outputs[f"prediction {name}"] = write_prediction(predicted, plan.out / "predictions" / f"{name}.h5ad")
        aligned = _align(plan.model, predicted, section)
        ours = list(aligned)[-1]
        for rival, fitted in rivals.items():
            expected = predict_section(fitted, section, seen.features[name])
            aligned[rival] = align(expected, section, use=contract.LOG1P_MEAN)
        scores[name] = {method: score_aligned(one) for method, one in aligned.items()}
        found[name] = intervals.compare(aligned, [(ours, rival) for rival in rivals], name, defaults.RESAMPLES)
        for pair, gains in found[name][1].items():
            say(f"{name}: {pair}: " + intervals.differences_in_words(gains, "pcc_200", "mse"))
    if held_out:
        outputs |= write_scores(plan.out, scores) | write_intervals(plan.out, found, defaults.RESAMPLES)
        rewrite_card(plan.out / "checkpoint", {name: _for_card(scores[name], found[name][0]) for name in scores})
    for section in held_out if plan.maps else ():  # last: a picture that fails loses nothing
        name = contract.name(section)
        predicted = reading.read_adata(outputs[f"prediction {name}"])
        shown = scores[name].get(f"{plan.model}_mean", scores[name][plan.model]).per_gene
        maps.write_section_maps(predicted, section, shown, plan.out / "maps")
        outputs["maps"] = plan.out / "maps"
    return scores


@dataclass
class _Seen:
    """What a model sees of the spots, by section: features of an encoder, or patches."""

    facts: dict
    """for the checkpoint"""
    features: dict[str, Any]
    """float32 [N, views, F], in memory or as :class:`~genar.features.StoredInputs`"""
    stores: list[dict[str, Path]] = field(default_factory=list)
    """section -> feature store, one for each patch width"""
    patches: dict[str, Tensor] = field(default_factory=dict)
    """of the held-out sections"""
    training_patches: Tensor | None = None
    """of all training sections, one after the other"""
    imported: dict[str, dict[str, str]] = field(default_factory=dict)
    """hashes of features that were made elsewhere, which no recipe tells apart"""


def _check_sources(plan: TrainPlan, sections: Sequence[AnnData]) -> None:
    """Refuse, before the panel is selected, sections of whose spots nothing can be seen: no pixels, no features."""
    pixels.check_images(sections, needed=plan.input == "patches")
    imported = plan.encoder.startswith(encoders.IMPORTED)
    bare = [section for section in sections if imported or contract.slide_path(section) is None]
    if plan.input == "features" and bare:
        encoder, recipe = _encoder(plan)
        for section in bare:
            for one in plan.inputs.recipes(recipe):
                check_source(section, encoder, one, plan.features or default_store())


def _encoder(plan: TrainPlan) -> tuple[encoders.Encoder, FeatureRecipe]:
    encoder = encoders.load_encoder(
        plan.encoder, weights=plan.weights, device=plan.device, precision=plan.encoder_precision
    )
    return encoder, recipe_of(encoder, patch=plan.patch, views=plan.views)


def _embedded(plan: TrainPlan, training: list[AnnData], held_out: list[AnnData], bar: Bar) -> _Seen:
    encoder, recipe = _encoder(plan)
    sections = (*training, *held_out)
    inputs, store = plan.inputs, plan.features or default_store()
    stores = [embed_sections(sections, encoder, one, store, bar) for one in inputs.recipes(recipe)]
    named = {contract.name(section): section for section in sections}
    features = {n: StoredInputs([made[n] for made in stores], s, inputs) for n, s in named.items()}
    for one in features.values():
        one.check()  # damage shows before the long work
    is_foreign = plan.encoder.startswith(encoders.IMPORTED)
    imported = {"imported features": {n: imported_sha256(stores[0][n]) for n in named}} if is_foreign else {}
    return _Seen(asdict(recipe) | asdict(inputs), features, stores, imported=imported)


def _seen_as_pixels(plan: TrainPlan, training: list[AnnData], held_out: list[AnnData], bar: Bar) -> _Seen:
    recipe = pixels.PixelRecipe.of(model_class(plan.model), plan.patch)
    folder = plan.out / "resume" / processes.own_folder()
    learned, asked = (pixels.read_pixels(part, recipe, folder, bar=bar) for part in (training, held_out))
    features = {contract.name(s): pixels.no_features(s.n_obs) for s in (*training, *held_out)}
    names = [contract.name(section) for section in held_out]
    patches = dict(zip(names, asked.split([section.n_obs for section in held_out]), strict=True))
    return _Seen(recipe.facts, features, [], patches, learned)


def _read(plan: TrainPlan, say, bar: Bar) -> tuple[list[AnnData], list[AnnData], Panel, dict[str, str]]:
    """Training and held-out sections with the genes of the panel alone, the panel, and each section's digest.

    Memory never holds all genes of all: where the panel is to be selected, sections beyond the first are read again.
    """
    refs = find_sections(plan.sections)
    refs = pick(refs, plan.only) if plan.only else refs
    test = pick(refs, plan.test)
    train = [ref for ref in refs if ref not in test]
    if not train:
        raise InputError(f"{plan.sections}: all {len(refs)} sections are held out; leave at least one for training")
    train_ids, held_ids = (named([ref.id for ref in part]) for part in (train, test))
    say(f"reading {len(refs)} sections: {train_ids} to train, {held_ids} held out")
    options = options_for(refs, mpp=plan.mpp, image=plan.image, bin_um=plan.bin_um)
    panel = read_panel(plan.panel) if Path(plan.panel).is_file() else None
    kept, held = (Sections(part, options, 0 if panel else HELD_BYTES) for part in (train, test))
    digests: dict[str, str] = {}

    def sound(section: AnnData) -> AnnData:
        if not contract.has_counts(section):
            raise InputError(
                f"section {contract.name(section)}: a slide without counts; train on sections that have them, and "
                "give slides to `genar predict`"
            )
        digests[contract.name(section)] = contract.digest(section)
        return section

    training, held_out = _cut(kept, held, list(panel.genes) if panel else [], bar, sound)
    if note := shared_patients_note(*map(_patients, (training, held_out))):
        say(f"note: {note}")
    _check_sources(plan, (*training, *held_out))
    if panel is None:
        say(f"selecting {plan.n_genes} genes by recipe {plan.panel} on the training sections")
        panel = select_panel(kept, n_genes=plan.n_genes, recipe=plan.panel, bar=bar)
        training, held_out = _cut(kept, held, list(panel.genes), bar)
    elif note := leak_note(panel, plan.panel, (contract.name(section) for section in held_out)):
        say(f"note: {note}")
    return training, held_out, panel, digests


def _cut(
    kept: Sections, held: Sections, genes: list[str], bar: Bar, look: Callable[[AnnData], AnnData] = lambda read: read
) -> tuple[list[AnnData], list[AnnData]]:
    """Training and held-out sections with ``genes`` alone, once ``look`` has seen each with all."""
    total = len(kept) + len(held)
    with bar("reading sections", total) as tick:
        training = [contract.cut(look(one), genes) for one in counted(kept, tick, total)]
        asked = counted(held, tick, total, len(kept))
        return training, [contract.cut(look(one), genes, images=True) for one in asked]


def _patients(sections: list[AnnData]) -> set[str]:
    return {str(section.uns[contract.GENAR][contract.PATIENT]) for section in sections} - {""}


def _baseline(name: str, spots: AnySpots, beside: Checkpoint) -> Checkpoint:
    """A closed-form model fitted on the same spots, panel and features."""
    cls = model_class(name)
    model = cls.create(spots.n_features, look_at(cls, spots), "", {})
    fit(model, spots, TrainConfig())
    return Checkpoint(name, model, beside.panel, beside.features, beside.training)


def _align(method: str, predicted: AnnData, truth: AnnData) -> dict[str, Aligned]:
    """The method's own name stands for X by its default decoding; ``_mean`` for the expectation, where that is another
    thing."""
    expected = contract.LOG1P_MEAN in predicted.layers
    if expected and predicted.uns[contract.GENAR][contract.PREDICTION]["decode"] == "mean":
        return {method: align(predicted, truth, use=contract.LOG1P_MEAN)}
    return align_both(method, predicted, truth)


def _for_card(scores: dict[str, Scores], found: dict[str, dict]) -> dict[str, dict]:
    """method -> metric -> (value, low, high), and the coverage, which has no interval."""
    kept = {name: {m: v for m, v in s.summary.items() if m == "coverage_90"} for name, s in scores.items()}
    return {name: {**found[name], **kept[name]} for name in scores}


def _training_facts(
    plan: TrainPlan, config: TrainConfig, training, held_out, spots: AnySpots, summary: FitSummary
) -> dict:
    mean, variance = count_moments(spots)
    return {
        "sections": [contract.name(s) for s in training],
        "held_out": [contract.name(s) for s in held_out],
        "patients": sorted(_patients(training)),
        **{
            name: median([float(s.uns[contract.GENAR].get(name, 0)) for s in training])
            for name in (contract.PITCH_UM, contract.SPOT_DIAMETER_UM)
        },
        "hexagonal": median([Lattice.of(torch.from_numpy(contract.coords_um(s))).fold for s in training]) == 6,
        contract.SIMULATED: any(map(contract.of_simulation, training)),
        "n_spots": len(spots),
        contract.TRAINING_MEAN: mean.tolist(),
        contract.TRAINING_VARIANCE: variance.tolist(),
        "preset": plan.preset,
        "config": asdict(config),
        "best_epoch": summary.best_epoch,
        "history": summary.history,
    }


def _write_run(plan: TrainPlan, config: TrainConfig, how: Decoding, checkpoint, digests, stores, clock) -> None:
    facts = {
        "command": " ".join(sys.argv),
        "genar_version": genar.__version__,
        "plan": json_ready(asdict(plan)),
        "model": checkpoint.model.facts(),
        "train": asdict(config),
        "decoding": asdict(how),
        "seeds": {"training": config.seed, "prediction": how.seed},
        "data": digests,
        "panel_sha256": checkpoint.panel.sha256,
        "input": plan.input,
        "features": {name: [made[name].name for made in stores] for name in (stores[0] if stores else ())},
        "patches": checkpoint.features if plan.input == "patches" else None,
        "checkpoint_sha256": checkpoint.sha256,
        "environment": machine.environment(),
        "seconds": clock.seconds,
        "peak_rss_mib": clock.peak_rss_mib(),
    }
    write_text(plan.out / "run.json", json.dumps(facts, indent=1) + "\n")
