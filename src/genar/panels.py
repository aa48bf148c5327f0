"""The panel of a folder of sections: selected by a recipe, or a list of genes held against them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from genar import defaults
from genar.data import ReadOptions, Sections, find_sections, without
from genar.data.progress import Bar, no_bar
from genar.genes import (
    PAPER_N_TOP,
    Panel,
    check_place,
    listed_panel,
    read_aliases,
    read_panel,
    refuse_number,
    select_panel,
)


def panel_run(
    source: str,
    out: Path,
    *,
    recipe: str = defaults.PANEL,
    n_genes: int | None = None,
    n_top: int = PAPER_N_TOP,
    exclude: Sequence[str] = (),
    aliases: Path | None = None,
    options: Mapping | None = None,
    bar: Bar = no_bar,
) -> Panel:
    """Select the panel by a ``recipe`` on the sections in ``source`` but those to ``exclude``, or check the list of
    genes that it names (by other names: ``aliases``), write it to ``out`` and return it.

    ``n_genes`` is 200 where not given; of ``paper`` then all genes of the intersection at rank ``n_top``. ``options``
    are fields of ``ReadOptions``. Raises ``InputError`` where ``out`` is something else's, a section is not there or
    none is left, a gene is not measured, or fewer are left than asked for.
    """
    check_place(out)
    chosen = Sections(without(find_sections(source), exclude), ReadOptions(**(options or {})))
    if Path(recipe).is_file():
        refuse_number(n_genes, recipe)
        panel = listed_panel(read_panel(recipe), chosen, read_aliases(aliases) if aliases else None)
    else:
        n_genes = defaults.N_GENES if n_genes is None and recipe != "paper" else n_genes
        panel = select_panel(chosen, n_genes=n_genes, recipe=recipe, n_top=n_top, bar=bar)
    panel.write(out)
    return panel
