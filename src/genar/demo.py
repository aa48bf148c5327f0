"""The main job on simulated tissue, from nothing to a page to look at: ``genar demo``."""

from collections.abc import Callable
from pathlib import Path

from genar.data.progress import Bar, no_bar
from genar.data.simulate import TissueConfig, write_tissue
from genar.errors import InputError
from genar.report.index import write_report
from genar.runs import RunResult, tidy, train_run
from genar.settings import Settings
from genar.train_plan import TrainPlan

TISSUE, N_GENES, SAMPLES = TissueConfig(), 100, 8
"""small enough for a few minutes on two cores"""


def demo_run(out: Path, *, seed: int = 0, say: Callable[[str], None] = print, bar: Bar = no_bar) -> RunResult:
    """Simulate a tissue of two sections, train GenAR on the one, predict and score the other, write its page.

    Raises ``InputError`` where ``out`` holds a finished demo, before anything is made.
    """
    page = out / "report.html"
    if (out / "run" / "run.json").exists():
        tidy(out / "run")
        if page.exists():
            raise InputError(f"{out}: holds a finished demo; delete the folder, or give another --out")
        return RunResult(write_report(out / "run", page, say=say), {}, {})  # it was stopped while that was written
    tissue = out / "simulated_tissue"
    say("simulating two tissue sections (no patient's)")
    write_tissue(tissue, ("SIM1", "SIM2"), seed, TISSUE)
    settings = Settings(decoding={"samples": SAMPLES})
    plan = TrainPlan(
        tissue, ("SIM2",), out / "run", features=out / "features", n_genes=N_GENES, settings=settings
    )  # fmt: skip
    result = train_run(plan, say=say, bar=bar)
    result.outputs["simulated tissue"] = tissue
    result.outputs |= write_report(out / "run", page, say=say)
    return result
