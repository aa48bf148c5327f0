"""The commands. Each parses, calls one function and says where the result lies; heavy imports wait until then."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

import genar
from genar import _console, defaults, machine, processes
from genar._options import (
    BinUm,
    Command,
    Device,
    Group,
    Hexagonal,
    Image,
    Json,
    Mpp,
    OneSection,
    Out,
    Patch,
    Samples,
    SectionDir,
    SpacingUm,
    Store,
    Views,
    Weights,
    changed,
    given,
    ids,
    numbers,
    refuse_beside,
    refuse_beside_patches,
)
from genar.errors import InputError, first_names, named

app = typer.Typer(
    name="genar",
    help="Raw gene counts of every spot of a tissue slide, generated from its H&E image scale by scale.",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Entry point: exit code 0 done, 2 the input is wrong (one line on standard error, with ``--json`` an object on
    standard output), 1 a fault of ours, 128 + N stopped by signal N."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    machine.keep_freed_memory()
    if processes.rank():  # the first process speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    processes.end_with_parent()
    with _console.one_line():
        app()


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"genar {genar.__version__}")
        raise typer.Exit


@app.command(cls=Command)
def demo(
    out: Out = Path("genar-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of the tissue.")] = 0,
    json: Json = False,
) -> None:
    """Simulate two tissue sections, train on one, predict and score the other. Offline, within minutes."""
    with _console.loading():
        from genar.demo import demo_run

    say = _console.speaker(json)
    say("This demo runs on SIMULATED tissue: it shows the way, not a result on patients.")
    _console.tell_run(
        demo_run(out, seed=seed, say=say, bar=_console.bar(json)),
        json,
        "simulated tissue, not a result on patients",
    )


@app.command(cls=Command)
def check(
    paths: Annotated[list[str], typer.Argument(help="Folders of sections or slides, or single ones.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for an overlay PNG per section.")] = Path(
        "genar-check"
    ),
    features: Annotated[Path | None, typer.Option("--features", help="Folder of feature stores to look into.")] = None,
    panel: Annotated[Path | None, typer.Option(help="panel.json or a list of genes that each must have.")] = None,
    image: Image = None,
    bin_um: BinUm = None,
    spacing_um: SpacingUm = None,
    hexagonal: Hexagonal = None,
    mpp: Mpp = None,
    json: Json = False,
) -> None:
    """Read sections and slides, say what is wrong, draw the spots on the tissue. Exit code 2 where a run would fail."""
    from dataclasses import asdict

    with _console.loading():
        from genar.genes import read_panel
        from genar.report.sections import check_sections

    result = check_sections(
        paths, out=out, features=features, panel=read_panel(panel) if panel else None, image=image, bin_um=bin_um,
        spacing_um=spacing_um, hexagonal=hexagonal, mpp=mpp,
    )  # fmt: skip
    if not json:
        if result.sections:
            _console.show(_console.check_table(result))
        for row in result.sections:
            if row.note or row.counts_from not in ("", "X"):
                print(f"{row.section}: " + "; ".join(filter(None, (row.note, f"counts are in {row.counts_from}"))))
    for line in (*result.duplicates, *(w for row in result.sections for w in row.warnings)):
        print(f"warning: {line}", file=sys.stderr)
    for fault in result.all_faults:
        print("error: " + " ".join(fault.split()), file=sys.stderr)
    overlays = {f"overlay {Path(row.overlay).stem}": row.overlay for row in result.sections if row.overlay}
    rows = [asdict(row) for row in result.sections]
    wrong = {"status": _console.WRONG, "error": "; ".join(result.all_faults)} if result.all_faults else {}
    figures = {"sections": rows, "faults": result.all_faults, "duplicates": result.duplicates}
    _console.finish(json, overlays, **wrong, **figures)
    if result.all_faults:
        raise typer.Exit(2)


@app.command(cls=Command)
def fetch(
    dataset: Annotated[str, typer.Argument(help="her2st, prad, kidney, mouse_brain or ccrcc.")],
    out: Out,
    source: Annotated[str, typer.Option(help="hub (HEST-1k), or github (her2st: raw files, converted).")] = "hub",
    sections: Annotated[str, typer.Option(help="Only these sections, ID,ID; all where not given.")] = "",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the source.")] = None,
    extras: Annotated[str, typer.Option("--with", help="Further files of the hub: tissue_seg, patches.")] = "",
    json: Json = False,
) -> None:
    """Download a data set of the paper in HEST-1k layout; what is there is kept, broken downloads are resumed."""
    with _console.loading():
        from genar.fetch import fetch_dataset

    done = fetch_dataset(
        dataset, out, source=source, sections=ids(sections), revision=revision, extras=ids(extras),
        say=_console.speaker(json), bar=_console.bar(json, "bytes"),
    )  # fmt: skip
    figures = {name: getattr(done, name) for name in ("revision", "n_bytes", "n_files_new", "n_files_kept")}
    _console.finish(json, {"sections": done.folder}, n_sections=len(done.sections), **figures)


@app.command(cls=Command)
def features(
    sections: SectionDir,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the stores (default: $GENAR_FEATURES, or your cache).")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="Name (see `genar encoders`), timm/NAME, or module:function.")
    ] = defaults.ENCODER,
    weights: Weights = None,
    patch: Patch = defaults.PATCH,
    views: Views = defaults.VIEWS,
    widths_um: Annotated[
        str,
        typer.Option(
            help="Patch widths in um, each embedded (default: 112,309, for model genar; one with other --patch)."
        ),
    ] = "",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = defaults.PRECISION,
    batch_size: Annotated[int, typer.Option(help="Patches that go through the encoder at once.")] = defaults.BATCH_SIZE,
    workers: Annotated[int | None, typer.Option(help="Processes that read patches (default: by the machine).")] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", help="Folder of features made elsewhere (.h5, .pt, .npy).")
    ] = None,
    device: Device = "auto",
    image: Image = None,
    bin_um: BinUm = None,
    spacing_um: SpacingUm = None,
    hexagonal: Hexagonal = None,
    mpp: Mpp = None,
    json: Json = False,
) -> None:
    """Embed every spot of every section, or import features; what is stored already is not made again."""
    with _console.loading():
        from genar import encoders
        from genar import features as embedding
        from genar.data import read_places

    out = out or embedding.default_store()
    reading = given(mpp=mpp, image=image, bin_um=bin_um, spacing_um=spacing_um, hexagonal=hexagonal)
    if import_ is not None:
        own = {"--weights": weights, "--widths-um": widths_um, "--workers": workers} | changed({
            "--patch": (patch, defaults.PATCH), "--views": (views, defaults.VIEWS),
            "--precision": (precision, defaults.PRECISION), "--batch-size": (batch_size, defaults.BATCH_SIZE),
        })  # fmt: skip
        refuse_beside(f"--import {import_}", own)
        read = read_places(sections, bar=_console.bar(json), **reading)
        return _console.finish(json, embedding.import_sections(read, import_, encoder, out))
    widths = numbers(widths_um, "--widths-um") or (defaults.WIDTHS_UM if patch == defaults.PATCH else ())
    loaded = encoders.load_encoder(encoder, weights=weights, device=machine.device(device), precision=precision)
    embedding.recipe_of(loaded, patch=patch, views=views)  # what it refuses is refused before sections are read
    read = read_places(sections, bar=_console.bar(json), **reading)
    stores = embedding.embed_widths(
        read, loaded, out, patch=patch, views=views, widths_um=widths, batch_size=batch_size, bar=_console.bar(json),
        workers=embedding.default_workers(loaded.device.type) if workers is None else workers,
    )  # fmt: skip
    _console.finish(json, stores)


@app.command(cls=Command)
def panel(
    sections: SectionDir,
    out: Out,
    recipe: Annotated[
        str, typer.Option(help="Panel recipe: clean, paper, hvg, highest_mean, moran, or a file of genes.")
    ] = defaults.PANEL,
    n_genes: Annotated[
        int | None, typer.Option(help=f"Genes to take (default: {defaults.N_GENES}; paper: the whole intersection).")
    ] = None,
    n_top: Annotated[
        int, typer.Option(help="Recipe paper: rank cut by mean and by standard deviation.")
    ] = defaults.PAPER_N_TOP,
    exclude: Annotated[str, typer.Option(help="Sections to leave out (held out), ID,ID.")] = "",
    aliases: Annotated[
        Path | None, typer.Option(help="Other names for genes of the file: a line each, name and name here.")
    ] = None,
    bin_um: BinUm = None,
    mpp: Mpp = None,
    json: Json = False,
) -> None:
    """Select the gene panel, or check a list of genes against the sections."""
    with _console.loading():
        from genar.panels import panel_run

    own = {} if recipe == "paper" else changed({"--n-top": (n_top, defaults.PAPER_N_TOP)})
    refuse_beside(f"--recipe {recipe}", own if Path(recipe).is_file() else {"--aliases": aliases, **own})
    selected = panel_run(
        sections, out, recipe=recipe, n_genes=n_genes, n_top=n_top, exclude=ids(exclude), aliases=aliases,
        options=given(mpp=mpp, bin_um=bin_um), bar=_console.bar(json),
    )  # fmt: skip
    say = _console.speaker(json)
    say(f"{len(selected.genes)} genes: {first_names(selected.genes, 8)}")
    if not Path(recipe).is_file():
        say(f"note: the choice has seen {named(selected.sections)}: hold none of them out with this panel")
    _console.finish(json, {"panel": out}, n_genes=len(selected.genes), n_top=selected.n_top, sha256=selected.sha256)


@app.command(cls=Command)
def groups(
    source: Annotated[str, typer.Argument(help="A training run, or with --panel a folder of sections.")],
    out: Out = Path("genar-groups"),
    panel: Annotated[Path | None, typer.Option(help="panel.json or a list of genes, to group on sections.")] = None,
    scale: Annotated[int | None, typer.Option(help="Groups of one scale, 0 the coarsest (default: clusters).")] = None,
    gmt: Annotated[Path | None, typer.Option(help="Gene sets; tells which groups are enriched in which.")] = None,
    exclude: Annotated[str, typer.Option(help="Sections to leave out (held out), ID,ID.")] = "",
    bin_um: BinUm = None,
    mpp: Mpp = None,
    json: Json = False,
) -> None:
    """Print the groups of genes, and with gene sets what each is enriched in."""
    with _console.loading():
        from genar.groups import groups_run

    if panel is None:
        refuse_beside("the groups of a model", {"--exclude": exclude, "--bin-um": bin_um, "--mpp": mpp})
    found = groups_run(source, out, panel=panel, scale=scale, gmt=gmt, exclude=ids(exclude), bin_um=bin_um, mpp=mpp)
    for table in () if json else _console.group_tables(found):
        _console.show(table)
    sets = [] if found.sets is None else found.sets.to_dict(orient="records")
    _console.finish(json, found.outputs, groups=found.groups, sets=sets)


@app.command(cls=Command)
def train(
    sections: SectionDir,
    out: Out,
    test: Annotated[str, typer.Option(help="Sections held out, ID,ID.")] = "",
    model: Annotated[str, typer.Option(help="Name of the model (see `genar models`).")] = defaults.MODEL,
    preset: Annotated[
        str, typer.Option(help="Size: small; of genar also released, paper; of published methods official.")
    ] = defaults.PRESET,
    recipe: Annotated[str, typer.Option(help="Training recipe: default or paper.")] = defaults.RECIPE,
    panel: Annotated[
        str, typer.Option(help="Panel recipe (see `genar panel`), panel.json or a list of genes.")
    ] = defaults.PANEL,
    n_genes: Annotated[
        int | None, typer.Option(help=f"Genes of a selected panel (default: {defaults.N_GENES}).")
    ] = None,
    encoder: Annotated[str, typer.Option(help="Name of the encoder.")] = defaults.ENCODER,
    weights: Weights = None,
    patch: Patch = defaults.PATCH,
    input: Annotated[
        str, typer.Option(help="features of the encoder, or patches: end to end on pixels.")
    ] = defaults.INPUT,
    views: Views = defaults.VIEWS,
    features: Store = None,
    samples: Samples = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.")] = None,
    encoder_precision: Annotated[str, typer.Option(help="Of the features: fp32, bf16 or fp16.")] = defaults.PRECISION,
    seed: Annotated[int | None, typer.Option(help="Seed of the training.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of model, training, inputs or decoding; repeatable.")
    ] = None,
    device: Device = "auto",
    devices: Annotated[
        int | None, typer.Option(help="Processes that share the training (default: those of torchrun or srun, or 1).")
    ] = None,
    num_nodes: Annotated[int | None, typer.Option(help="Machines that share it (default: as devices).")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches a step: gradients are added (default: 1).")] = None,
    image: Image = None,
    bin_um: BinUm = None,
    mpp: Mpp = None,
    json: Json = False,
) -> None:
    """Train a model and score it on the held-out sections, beside `mean` and `ridge`."""
    with _console.loading():
        from genar import runs
        from genar.settings import read_settings

    if input == "patches":
        refuse_beside_patches(
            encoder=encoder, views=views, encoder_precision=encoder_precision, weights=weights, features=features
        )
    settings = read_settings(config, set_ or [], model)
    settings.train.update(given(precision=precision, seed=seed, accumulate=accumulate))
    settings.decoding.update(given(samples=samples))
    plan = runs.TrainPlan(
        Path(sections), tuple(ids(test)), out, model, preset=preset, recipe=recipe, panel=panel, n_genes=n_genes,
        encoder=encoder, weights=weights, patch=patch, views=views, features=features, mpp=mpp,
        device=machine.device(device), settings=settings, image=image, bin_um=bin_um, input=input,
        encoder_precision=encoder_precision, devices=devices, num_nodes=num_nodes,
    )  # fmt: skip
    result = runs.train_run(
        plan, say=_console.speaker(json), bar=_console.bar(json), progress=_console.is_watched(json)
    )
    _console.tell_run(result, json)


@app.command(cls=Command)
def predict(
    section: Annotated[str, typer.Argument(help="A bare slide, or one section: its own file or folder, or FOLDER:ID.")],
    model: Annotated[str, typer.Option(help="A training run, its checkpoint folder, or ORG/NAME on the hub.")],
    out: Out,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")] = None,
    decode: Annotated[
        str | None,
        typer.Option(help="What makes X: greedy, mean, median, quantiles or sample (default: the model's first)."),
    ] = None,
    samples: Samples = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the trajectories.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of the decoding (temperature, top_k, top_p, layers, …)."),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="h5ad, spatialdata, … (see `genar export`) (default: by the suffix of --out).")
    ] = None,
    features: Store = None,
    encoder: Annotated[str | None, typer.Option(help="module:function of the model's encoder: lets it run.")] = None,
    weights: Weights = None,
    image: Image = None,
    bin_um: BinUm = None,
    spacing_um: SpacingUm = None,
    hexagonal: Hexagonal = None,
    mpp: Mpp = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Predict the counts of a section or of a bare slide with a trained model."""
    with _console.loading():
        from genar import inference
        from genar.settings import read_decoding

    how = {**read_decoding(set_ or []), **given(decode=decode, samples=samples, seed=seed)}
    reading = given(image=image, bin_um=bin_um, spacing_um=spacing_um, hexagonal=hexagonal, mpp=mpp)
    predicted = inference.predict_run(
        section, model, out, reading=reading, revision=revision, kind=format, features=features, encoder=encoder,
        weights=weights, how=how,
        device=machine.device(device), bar=_console.bar(json), say=_console.speaker(json),
    )  # fmt: skip
    outputs = {"prediction": out} | inference.tissue_overlay(predicted, out)
    _console.finish(json, outputs, n_spots=predicted.n_obs, n_genes=predicted.n_vars)


@app.command(cls=Command)
def push(
    model: Annotated[str, typer.Argument(help="A training run, or its checkpoint folder.")],
    hub_id: Annotated[str, typer.Argument(help="ORG/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write to (default: main).")] = None,
    json: Json = False,
) -> None:
    """Share a checkpoint, with its card, on the Hugging Face hub. Read the card first: it names your sections."""
    with _console.loading():
        from genar.models.checkpoint import push_checkpoint

    _console.finish(json, {"model": push_checkpoint(model, hub_id, private=private, revision=revision)})


@app.command(cls=Command)
def evaluate(
    predicted: Annotated[Path, typer.Argument(help="Prediction, .h5ad.")],
    truth: OneSection,
    out: Out,
    against: Annotated[Path | None, typer.Option(help="Another prediction, .h5ad: paired differences.")] = None,
    panel: Annotated[Path | None, typer.Option(help="panel.json or a list: the genes that must be predicted.")] = None,
    genes: Annotated[str, typer.Option(help="same: refuse genes that differ; common: score those all have.")] = "same",
    resamples: Annotated[
        int, typer.Option(min=0, help="Bootstrap resamples of the intervals; 0: none.")
    ] = defaults.RESAMPLES,
    image: Image = None,
    bin_um: BinUm = None,
    mpp: Mpp = None,
    json: Json = False,
) -> None:
    """Score a prediction, whoever made it, against the measured section, with 95 % intervals."""
    with _console.loading():
        from genar import assess
        from genar.data.truth import read_truth
        from genar.genes import read_panel

    prediction = assess.read_prediction(predicted)
    read = read_truth(truth, prediction, **given(image=image, bin_um=bin_um, mpp=mpp))
    result = assess.evaluate_run(
        prediction, read, out, against=assess.read_prediction(against) if against else None,
        panel=read_panel(panel).genes if panel else None, genes=genes, resamples=resamples,
    )  # fmt: skip
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if not json:
        for table in (*_console.score_tables(result), *_console.interval_tables(result)):
            _console.show(table)
    more = {"intervals": result.intervals, "differences": result.differences, "notes": result.notes}
    _console.finish(json, result.outputs, scores=_console.summaries(result), seconds=result.seconds, **more)


@app.command(cls=Command)
def report(
    source: Annotated[str, typer.Argument(help="Prediction (.h5ad), training run, or a folder of runs.")],
    out: Out = Path("report.html"),
    truth: Annotated[
        str | None,
        typer.Option(help="Measured section: its file or folder, or FOLDER:ID (default: the run's)."),
    ] = None,
    gene: Annotated[
        str, typer.Option(help="Gene that is shown first; of an index: of the small maps (default: the best).")
    ] = "",
    image: Image = None,
    bin_um: BinUm = None,
    mpp: Mpp = None,
    json: Json = False,
) -> None:
    """Write a page to look at: maps over the H&E, genes, groups, scores, calibration. One file, no network."""
    with _console.loading():
        from genar.report.index import write_report

    say, bar = _console.speaker(json), _console.bar(json)
    read = given(image=image, bin_um=bin_um, mpp=mpp)
    _console.finish(json, write_report(source, out, truth=truth, gene=gene, read=read, say=say, bar=bar))


@app.command(cls=Command)
def export(
    predicted: Annotated[Path, typer.Argument(help="Prediction, .h5ad.")],
    out: Out,
    format: Annotated[
        str | None, typer.Option(help="geojson, spatialdata, tissuumaps or vitessce (default: by the suffix of --out).")
    ] = None,
    genes: Annotated[str, typer.Option(help="Only these genes, GENE,GENE; all where not given.")] = "",
    json: Json = False,
) -> None:
    """Write a prediction for other programs: QuPath (.geojson), SpatialData (.zarr), TissUUmaps (.tmap), Vitessce."""
    with _console.loading():
        from genar.assess import read_prediction
        from genar.export import write_export

    adata = read_prediction(predicted)
    _console.finish(json, write_export(adata, out, format, genes=ids(genes)), n_spots=adata.n_obs)


@app.command(cls=Command)
def bench(
    recipe: Annotated[str, typer.Argument(help="Recipe: a YAML file, or the name of one that comes with GenAR.")],
    out: Out,
    data: Annotated[Path | None, typer.Option(help="Folder of the sections, or of a folder per data set.")] = None,
    features: Store = None,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run, and what is missing.")] = False,
    toy: Annotated[bool, typer.Option("--toy", help="The same plan on simulated sections, tiny models.")] = False,
    image: Image = None,
    bin_um: BinUm = None,
    mpp: Mpp = None,
    json: Json = False,
) -> None:
    """Run a recipe's methods on every fold and write its tables beside the paper's; what is there is not run again."""
    with _console.loading():
        from genar import bench as benching

    if toy:
        own = {"--data": data, "--features": features, "--image": image, "--bin-um": bin_um, "--mpp": mpp}
        refuse_beside("--toy (its sections are simulated)", own)
    made = benching.read_recipe(recipe)
    how = {
        "features": features, "device": machine.device(device), "say": _console.speaker(json),
        "read": given(image=image, bin_um=bin_um, mpp=mpp),
    }  # fmt: skip
    if dry_run:
        if toy:
            raise InputError("--dry-run tells what a recipe needs of your data, and --toy makes its own: leave one out")
        return _console.finish(json, {}, "planned", **vars(benching.plan_bench(made, data, out, **how)))
    result = benching.bench_run(made, data, out, bar=_console.bar(json), toy=toy, **how)
    if not json and "table" in result.outputs:
        print(result.outputs["table"].read_text(encoding="utf-8"))
    table, differences = (benching.nested(frame) for frame in (result.table, result.differences))
    _console.finish(json, result.outputs, table=table, differences=differences)


@app.command(cls=Command)
def encoders(json: Json = False) -> None:
    """List the patch encoders."""
    with _console.loading():
        from genar.encoders import ENCODERS

    rows = [row.facts() for row in ENCODERS.values()]
    _console.print_rows(
        json, "encoders", rows, ("name", "width", "input_px", "mpp", "pooling", "licence", "gated", "hub_id")
    )


@app.command(cls=Command)
def models(
    name: Annotated[str | None, typer.Argument(help="Print the card of this one.")] = None, json: Json = False
) -> None:
    """List the models, or tell what one keeps of its original and what it loses."""
    with _console.loading():
        from genar.models import model_names

    rows = [_console.model_facts(known) for known in (model_names() if name is None else [name])]
    if name is None or json:
        return _console.print_rows(json, "models", rows, ("name", "decodings", "unit", "inputs", "about"))
    for key, value in rows[0].items():
        parts = [f"{k} {v}" for k, v in value.items()] if isinstance(value, dict) else value
        if told := ", ".join(parts) if isinstance(parts, list) else parts:
            print(f"{key:<10} {told}")


if __name__ == "__main__":
    main()
