"""Predict one section or slide with a checkpoint, whatever it takes: features or patches are made where there are none.
One function, for the command and for notebooks."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import anndata
from anndata import AnnData
from torch import Tensor

from genar import encoders, machine, pixels
from genar.data import contract, options_for
from genar.data.door import door
from genar.data.files import scratch_beside
from genar.data.formats import find_section, used_by
from genar.data.progress import Bar, no_bar
from genar.data.reading import looks_like_visium
from genar.data.tissue import tissue_of
from genar.errors import InputError
from genar.export import format_of, refuse_foreign, write_export
from genar.features import StoredInputs, default_store, embed_sections, recipe_and_inputs
from genar.models.checkpoint import Checkpoint, load_checkpoint
from genar.prediction import decoding, held_bytes, predict_section, predict_to_file, unused_note, write_prediction
from genar.report import maps

STREAMED_BYTES = 2**29  # a prediction of more is not held in memory
_ALIKE = 0.2  # by what share spots may lie nearer or farther, or be wider or narrower, than in training


def predict_run(
    section: AnnData | str | Path,
    model: str | Path | Checkpoint,
    out: Path | None,
    *,
    reading: Mapping | None = None,
    revision: str | None = None,
    kind: str | None = None,
    features: Path | None = None,
    encoder: str | None = None,
    weights: Path | None = None,
    how: Mapping | None = None,
    device: str = "cpu",
    bar: Bar = no_bar,
    say: Callable[[str], None] = print,
) -> AnnData:
    """Predict one section (read, or where it lies) with a checkpoint (loaded, of a folder, a run or the hub, there at
    ``revision``), embedding it where its features are not stored, and write it: ``.h5ad``, or as ``kind`` or the suffix
    of ``out`` say one of the formats of ``genar.export``.

    ``reading`` holds the options of ``genar.read_section``; but the spots of a bare slide are as wide as those that the
    model was trained on, lie as far apart and on such an array, unless ``spot_um``, ``spacing_um`` and ``hexagonal``
    are there.

    A prediction of more than ``STREAMED_BYTES`` goes to its ``.h5ad`` block by block and comes back unread (anndata's
    backed mode); the other formats are made in memory. Without ``out`` nothing is written.

    ``how`` holds fields of ``Decoding`` that differ from the default (see ``prediction.decoding``). A model that was
    trained on patches reads them from the slide; then no encoder is loaded. An encoder that is a function
    (``module:function``) runs only where ``encoder`` names that very one: a checkpoint must not choose code.
    """
    if out is not None:
        kind = _kind(out, kind)
        refuse_foreign(out)
    checkpoint = model if isinstance(model, Checkpoint) else load_checkpoint(model, revision=revision)
    if not isinstance(section, AnnData):
        section = _read(section, checkpoint, reading or {})
    checkpoint.model.to(machine.of_models(device)).eval()
    decode = decoding(checkpoint.model, how or {})
    if not contract.has_counts(section):
        if out is not None:
            maps.refuse_foreign(_overlay_of(out))
        if pitch := section.uns[contract.GENAR].get(contract.PITCH_UM):
            array = "hexagonal" if looks_like_visium(section) else "square"
            say(f"{section.n_obs} spots, {pitch:.4g} um apart on a {array} grid")
    if cost := checkpoint.model.cost(section.n_obs, decode):
        say(cost)
    with scratch_beside(out or Path(tempfile.gettempdir(), "genar")) as scratch:
        if pixels.takes_patches(checkpoint.features):
            values, patches = pixels.no_features(section.n_obs), _patches_for(checkpoint, section, scratch, bar)
        else:
            say(f"features of {section.n_obs} spots: made where they are not stored")
            store = features or default_store()
            values, patches = _features_for(checkpoint, section, store, encoder, weights, device, bar), None
        say(f"predicting {section.n_obs} spots, {len(checkpoint.panel.genes)} genes")
        with bar(f"predicting {contract.name(section)}", section.n_obs) as tick:
            if out is not None and kind == "h5ad" and held_bytes(checkpoint, section, decode) > STREAMED_BYTES:
                predict_to_file(checkpoint, section, values, out, decode, patches=patches, progress=tick)
                predicted = anndata.read_h5ad(out, backed="r")
            else:
                predicted = predict_section(checkpoint, section, values, decode, patches=patches, progress=tick)
        del patches  # it may lie in the folder that goes now
    if note := unused_note(checkpoint.model, decode, how or {}, predicted.layers):
        say(note)
    notes = contract.trained_on_note(predicted), pitch_note(checkpoint, section), width_note(checkpoint, section)
    for note in filter(None, notes):
        say(f"note: {note}")
    if out is not None and kind != "h5ad":
        write_export(predicted, out, kind)
    elif out is not None and not predicted.isbacked:
        write_prediction(predicted, out)
    return predicted


def _read(path: str | Path, checkpoint: Checkpoint, reading: Mapping) -> AnnData:
    """The section at ``path``; a bare slide's spots as the model was trained on, where ``reading`` says no other."""
    ref = find_section(path)
    training = {"spacing_um": checkpoint.pitch_um, "spot_um": checkpoint.spot_um, "hexagonal": checkpoint.hexagonal}
    like_training = used_by([ref], {name: told for name, told in training.items() if told})
    return ref.read(options_for([ref], **{**like_training, **reading}))


def pitch_note(checkpoint: Checkpoint, section: AnnData) -> str:
    """What to say where a model that looks at neighbouring spots is given spots that lie at another distance than those
    it was trained on; else nothing."""
    here, there = section.uns[contract.GENAR].get(contract.PITCH_UM, 0), checkpoint.pitch_um
    looks = checkpoint.features.get("context_spots") or checkpoint.model.unit == "section"
    if not (looks and here > 0 and there) or _alike(here, there):
        return ""
    remedy = f"; --spacing-um {there:.4g} lays them so" if not contract.has_counts(section) else ""
    return f"the model looks at neighbours {there:.4g} um away, as in its training; here are {here:.4g} um{remedy}"


def width_note(checkpoint: Checkpoint, section: AnnData) -> str:
    """What to say where spots are wider or narrower than those that the model was trained on; else nothing."""
    here, there = section.uns[contract.GENAR].get(contract.SPOT_DIAMETER_UM, 0), checkpoint.spot_um
    if not (here > 0 and there) or _alike(here, there):
        return ""
    return f"counts are of spots {there:.4g} um wide, as in the model's training; here they are {here:.4g} um wide"


def _alike(here: float, there: float) -> bool:
    return abs(here / there - 1) <= _ALIKE


def _kind(out: Path, asked: str | None) -> str:
    """The format to write, by what was asked for or the suffix."""
    if asked in (None, "h5ad") and out.suffix == ".h5ad":
        return "h5ad"
    if asked == "h5ad":
        raise InputError(f"--out {out}: h5ad ends in .h5ad; name it {out.stem}.h5ad")
    return format_of(out, asked, ".h5ad")


def _patches_for(checkpoint: Checkpoint, section: AnnData, scratch: Path, bar: Bar) -> Tensor:
    """Pixels of a section as the checkpoint's model was trained on; where they are many, in a file in ``scratch``."""
    with door("checkpoint", "recipe of patches"):
        recipe = pixels.PixelRecipe.from_facts(checkpoint.features)
    return pixels.read_pixels([section], recipe, scratch, bar=bar)


def _features_for(
    checkpoint: Checkpoint, section: AnnData, store: Path, asked: str | None, weights: Path | None, device: str, bar
) -> StoredInputs:
    """Features of a section as the checkpoint's model was trained on, embedded where they are not stored."""
    recipe, inputs = recipe_and_inputs(checkpoint.features)
    if asked is not None and encoders.canonical(asked) != recipe.encoder:
        raise InputError(f"--encoder {asked}: the model was trained on {recipe.encoder}; name that, or none")
    if asked is None and encoders.runs_code(recipe.encoder):
        raise InputError(
            f"the model's encoder {recipe.encoder} is a function, and to predict runs its code: where you know that "
            f"code and trust it, pass --encoder {recipe.encoder}"
        )
    encoder = encoders.load_encoder(recipe.encoder, weights=weights, device=device, precision=recipe.precision)
    if encoder.weights_sha256 != recipe.weights_sha256:
        raise InputError(
            f"encoder {recipe.encoder}: its weights differ from those that the checkpoint was trained with "
            f"(sha256 {encoder.weights_sha256[:12]}…, expected {recipe.weights_sha256[:12]}…); pass the same --weights"
        )
    name = contract.name(section)
    paths = [embed_sections([section], encoder, one, store, bar)[name] for one in inputs.recipes(recipe)]
    return StoredInputs(paths, section, inputs)


def tissue_overlay(predicted: AnnData, out: Path) -> dict[str, Path]:
    """Write the tissue that was found on a bare slide, and the spots on it, beside its prediction ``out``; nothing for
    a section with counts."""
    slide = contract.slide_path(predicted)
    if predicted.uns[contract.GENAR].get(contract.SOURCE) != "slide" or slide is None:
        return {}
    view, mask, size_px, _ = tissue_of(slide, contract.mpp(predicted))
    return {"tissue": maps.write_overlay(predicted, _overlay_of(out), (view, mask, size_px))}


def _overlay_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}_tissue.png")
