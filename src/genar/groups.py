"""The groups of genes of a trained model, or of a panel on given sections, and the gene sets they are enriched in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from genar.data import contract, find_sections, options_for, without
from genar.data.files import drop_own, refuse_foreign, write_text
from genar.errors import InputError
from genar.genes import Panel, Scales, fit_scales, group_names, over_representation, read_gene_sets, read_panel
from genar.models.checkpoint import load_checkpoint


@dataclass
class Groups:
    """What ``genar groups`` found, and where it lies."""

    groups: list[tuple[str, ...]]
    sets: pd.DataFrame | None
    """as :func:`genar.genes.over_representation` returns it"""
    outputs: dict[str, Path]


def groups_run(
    source: str,
    out: Path,
    *,
    panel: Path | None = None,
    scale: int | None = None,
    gmt: Path | None = None,
    exclude: Sequence[str] = (),
    **options,
) -> Groups:
    """Write the group table of a training run (or its checkpoint), or of ``panel`` on the sections in ``source``.

    The groups are the clusters that the order was made of, or those of one ``scale`` (0 the coarsest). ``groups.csv``
    has a row a group; with a GMT file, ``sets.csv`` a row for each pair of a group and a gene set that share a gene.
    ``options`` tell how sections are read (``mpp``, ``bin_um``). Raises ``InputError`` where the source holds neither,
    or the model has no groups.
    """
    refuse_foreign(out / "groups.csv", "group,n_genes")
    model_panel, scales = _of_sections(source, panel, exclude, options) if panel else _of_model(source)
    groups = group_names(scales, model_panel.genes, scale)
    rows = [{"group": i, "n_genes": len(genes), "genes": " ".join(sorted(genes))} for i, genes in enumerate(groups)]
    outputs = {"groups": out / "groups.csv"}
    sets = over_representation(groups, read_gene_sets(gmt), model_panel.genes) if gmt else None
    write_text(outputs["groups"], pd.DataFrame(rows).to_csv(index=False))
    if sets is not None:
        outputs["gene sets"] = out / "sets.csv"
        write_text(outputs["gene sets"], sets.to_csv(index=False, float_format="%.6g"))
    else:
        drop_own(out / "sets.csv", "group,set,")
    return Groups(groups, sets, outputs)


def _of_model(source: str) -> tuple[Panel, Scales]:
    checkpoint = load_checkpoint(source)
    scales = getattr(checkpoint.model, "scales", None)
    if not isinstance(scales, Scales):
        raise InputError(f"{source}: model {checkpoint.name} has no groups of genes; expected one of genar's")
    return checkpoint.panel, scales


def _of_sections(source: str, file: Path, exclude: Sequence[str], options: Mapping) -> tuple[Panel, Scales]:
    panel = read_panel(file)
    refs = find_sections(source)
    how, genes = options_for(refs, **options), list(panel.genes)
    return panel, fit_scales(np.concatenate([contract.counts(ref.read(how), genes) for ref in without(refs, exclude)]))
