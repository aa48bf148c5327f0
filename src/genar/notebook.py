"""The two commands that do the most, as functions for notebooks and scripts."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from anndata import AnnData

from genar import _console, machine, processes
from genar._options import ids, refuse_beside_patches
from genar.errors import InputError
from genar.genes import Panel
from genar.inference import predict_run
from genar.models.checkpoint import Checkpoint
from genar.runs import RunResult, train_run
from genar.settings import read_settings, sort_decoding, sort_settings
from genar.train_plan import TrainPlan

_PATHS = ("weights", "features", "image")
_ALONE = ("samples", "seed", "precision", "accumulate")  # settings that are options, too


def train(
    sections: str | Path,
    out: str | Path,
    *,
    test: str | tuple[str, ...] | list[str] | None = (),
    model: str = "genar",
    settings: Mapping | None = None,
    config: str | Path | None = None,
    panel: str | Path | Panel = "clean",
    device: str = "auto",
    progress: bool = True,
    **options,
) -> RunResult:
    """Train a model on the sections of a folder and score it on those held out: what ``genar train`` does.

    ``test`` names the sections held out; ``settings`` are those of the model, the training, the inputs and the decoding
    (``--set``), over those of the YAML file ``config``; ``panel`` is a recipe, a file, or a ``Panel``, which is written
    beside ``out``; ``options`` are the command's others, spelt with underscores: ``preset``, ``recipe``, ``n_genes``
    (200), ``encoder``, ``patch``, ``views``, ``features`` (folder of the feature stores), ``weights``, ``mpp`` (um per
    px), ``image``, ``bin_um``, ``input``, ``encoder_precision``, ``samples`` (16), ``seed``, ``precision``,
    ``accumulate``. ``progress`` shows bars and prints what happens. Returns where things lie (``outputs``, name ->
    path) and the scores (``scores``, section -> method -> ``Scores``), both empty in all processes but the first of a
    script that torchrun or srun started. Goes on where it was stopped, if called again.
    Raises ``InputError`` as the command does, and where ``sections`` are no folder's name but sections in memory.

    >>> run = genar.train("tissue", "runs/ridge", test="SIM2", model="ridge", n_genes=20, views=1, progress=False)
    >>> sorted(run.scores["SIM2"])
    ['mean', 'ridge']
    """
    if not isinstance(sections, str | Path):
        raise InputError(
            f"train: expected a folder of sections, found {_kind_of(sections)}; write each section to DIR/<id>.h5ad "
            "(write_h5ad) and name DIR"
        )
    known = [f.name for f in fields(TrainPlan) if f.name not in ("sections", "test", "out", "settings")]
    known += _ALONE
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"train: option {name!r} is not known" + (f"; did you mean {near[0]!r}?" if near else ""))
    if options.get("input") == "patches":
        of_features = ("encoder", "views", "encoder_precision", "weights", "features")
        refuse_beside_patches(**{name: options[name] for name in of_features if name in options})
    options |= {name: Path(options[name]) for name in _PATHS if options.get(name) is not None}
    merged = read_settings(None if config is None else Path(config), (), model)
    alone = {name: value for name in _ALONE if (value := options.pop(name, None)) is not None}
    if not isinstance(settings or {}, Mapping):
        raise InputError(f"train: settings are a dictionary, as {{'lr': 0.001}}, found {_kind_of(settings)}")
    for given in (sort_settings(settings or {}, model), sort_settings(alone, model, owners=("train", "decoding"))):
        for name, values in vars(merged).items():
            values |= getattr(given, name)
    panel = _written(panel, Path(out)) if isinstance(panel, Panel) else str(panel)
    test = tuple(ids(test)) if isinstance(test, str) else tuple(test or ())
    for name in ("only", "beside"):
        if isinstance(options.get(name), str):
            options[name] = tuple(ids(options[name]))
    plan = TrainPlan(
        Path(sections), test, Path(out), model, settings=merged,
        panel=panel, device=machine.device(device), **options,
    )  # fmt: skip
    if max(plan.devices or 1, plan.num_nodes or 1) > 1 and not processes.by_launcher():
        raise InputError(
            "train: several processes would each run this very script from its start: give --devices to `genar train`, "
            "or start the script by torchrun or srun"
        )
    return train_run(
        plan, say=_say(progress), bar=_console.bar(not progress), progress=_console.is_watched(not progress)
    )


def _kind_of(given) -> str:
    """What was given, in a word or two."""
    of = f" of {type(given[0]).__name__}" if isinstance(given, list | tuple) and given else ""
    return f"{type(given).__name__}{of}"


def _written(panel: Panel, out: Path) -> str:
    """The file of a panel, beside a run: another panel is another file, so that a stopped run goes on with its own."""
    path = out.absolute().with_name(f"{out.absolute().name}-panel-{panel.sha256[:8]}.json")
    panel.write(path)
    return str(path)


def predict(
    section: AnnData | str | Path,
    model: str | Path | Checkpoint,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    features: str | Path | None = None,
    encoder: str | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    progress: bool = True,
    mpp: float | None = None,
    image: str | Path | None = None,
    bin_um: float | None = None,
    spacing_um: float | None = None,
    hexagonal: bool | None = None,
    **decoding,
) -> AnnData:
    """Predict the counts of a section, or of a bare slide, with a trained model: what ``genar predict`` does.

    ``section`` is what ``genar.read_section`` gave, or a path (a slide, a section's file or folder, ``FOLDER:ID``),
    read with ``mpp`` (um per px), ``image``, ``bin_um``, ``spacing_um`` (um between the spots of a bare slide) and
    ``hexagonal`` (their array; default of both: as in the model's training); ``model`` a training run, a checkpoint
    (loaded, or its folder) or ``ORG/NAME`` on the hub (at ``revision``). Features are taken from the stores in
    ``features`` (default: ``$GENAR_FEATURES``, else the user's cache) or made, with ``weights`` where the encoder's are
    a file; an encoder that is a function runs where ``encoder`` names it. ``decoding`` are fields of
    ``genar.models.Decoding``: ``decode``, ``samples`` (16), ``seed``, ``layers``, …. Written to ``out`` if given.

    Returns AnnData [N, G]: integer counts in ``X``, and the layers that the model has (``genar``: ``mean``,
    ``log1p_mean``, ``p_zero``, ``sd`` and quantiles; ``ridge``: ``log1p_mean`` alone). One of more than 0.5 GiB is left
    in the file ``out`` (anndata's backed mode). Raises ``InputError`` as the command does.

    >>> counts = genar.predict("tissue/wsis/SIM2.tif", "run", mpp=2.0, progress=False)
    >>> counts.n_vars, "log1p_mean" in counts.layers
    (20, True)
    """
    reading = {"mpp": mpp, "image": image, "bin_um": bin_um, "spacing_um": spacing_um, "hexagonal": hexagonal}
    given = {name: value for name, value in reading.items() if value is not None}
    if isinstance(section, AnnData) and given:
        raise InputError(f"predict: {', '.join(given)} tell how a file is read; this section was read already")
    if isinstance(model, Checkpoint) and revision is not None:
        raise InputError(f"revision {revision}: the checkpoint is loaded already; name one when you load it")
    paths = [None if path is None else Path(path) for path in (out, features, weights)]
    return predict_run(
        section, model, paths[0], reading=given, revision=revision, features=paths[1], encoder=encoder,
        weights=paths[2], how=sort_decoding(decoding),
        device=machine.device(device), bar=_console.bar(not progress), say=_say(progress),
    )  # fmt: skip


def _say(progress: bool):
    return _console.speaker(False) if progress else lambda line: None
