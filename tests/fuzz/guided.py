"""``python -m tests.fuzz.guided SECONDS``: inputs grown by what of the parsers they reach (needs atheris).

Only the parsers in Python are worth it: panels, aliases, GMT, YAML of settings and recipes, a checkpoint's
configuration.
"""

import contextlib
import sys
import tempfile
from pathlib import Path


def main(seconds: int) -> None:
    import atheris

    parsers = ["genar.genes.panel", "genar.genes.sets", "genar.settings", "genar.bench.recipe", "genar.data.yaml_text"]
    with atheris.instrument_imports(
        include=[*parsers, "genar.models.checkpoint", "yaml"], enable_loader_override=False
    ):
        from genar.bench.recipe import read_recipe
        from genar.errors import InputError
        from genar.genes import read_aliases, read_gene_sets, read_panel
        from genar.models.checkpoint import load_checkpoint
        from genar.settings import read_settings

    from .targets import TARGETS

    with tempfile.TemporaryDirectory(prefix="genar-fuzz-") as place:
        folder, corpus = Path(place), Path(place) / "corpus"
        ways = {
            "panel.json": read_panel,
            "panel.txt": read_panel,
            "aliases.txt": read_aliases,
            "sets.gmt": read_gene_sets,
            "config.yaml": lambda path: read_settings(path, []),
            "recipe.yaml": lambda path: read_recipe(str(path)),
            "genar/config.json": lambda path: load_checkpoint(path.parent),
        }
        corpus.mkdir()
        for target in ("panels", "settings", "recipe", "checkpoint"):
            TARGETS[target].seed(folder)
        for number, name in enumerate(ways):
            (corpus / str(number)).write_bytes(bytes([number]) + (folder / name).read_bytes())

        def one(data: bytes) -> None:
            name = list(ways)[data[0] % len(ways)] if data else "panel.txt"
            (folder / name).write_bytes(data[1:])
            with contextlib.suppress(InputError):
                ways[name](folder / name)

        limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=3000", "-max_len=20000"]
        atheris.Setup([sys.argv[0], *limits, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
