"""A few of the moments at which ``python -m tests.faults`` kills each command; all 200: ``GENAR_FAULTS=200``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import genar

ROOT = Path(__file__).parent.parent
N_MOMENTS = os.environ.get("GENAR_FAULTS", "5")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process that has loaded PyTorch may not fork")
def test_commands_killed_at_random_moments_end_as_if_they_had_not_been(tmp_path):
    words = ["--moments", N_MOMENTS, "--json", tmp_path / "found.json"] + ["--side", 5] * (N_MOMENTS == "5")
    environment = {**os.environ, "PYTHONPATH": str(Path(genar.__file__).parents[1])}
    started = [sys.executable, "-m", "tests.faults", *map(str, words)]
    done = subprocess.run(started, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{N_MOMENTS} moments, 0 faults" in done.stdout
    assert (tmp_path / "found.json").is_file()


def test_the_harness_sees_what_differs(tmp_path, monkeypatch):
    """It is not blind: other bytes, a missing file, a file left behind, hidden or not; time and memory are no fault."""
    monkeypatch.syspath_prepend(ROOT)
    from tests.faults.harness import contents, differences

    one, other = tmp_path / "one", tmp_path / "other"
    for folder, seconds in ((one, 1.5), (other, 2.5)):
        (folder / "deep").mkdir(parents=True)
        (folder / "run.json").write_text(f'{{"seed": 1, "seconds": {{"training": {seconds}}}}}')
        (folder / "runs.csv").write_text(f"run,seconds_training,seconds\na,{seconds},{seconds}\n")
        (folder / "deep" / "weights").write_bytes(b"same")
    assert differences(contents(one), contents(other)) == []
    (other / "run.json").write_text('{"seed": 2, "seconds": 1}')
    (other / "runs.csv").write_text("run,seconds_training,seconds\nb,1,1\n")
    (other / "deep" / "weights").unlink()
    (other / "deep" / ".weights.half").touch()
    assert differences(contents(one), contents(other)) == [
        ("deep/weights", "is missing"), ("deep/.weights.half", "was left behind"),
        ("run.json", "has other bytes"), ("runs.csv", "has other bytes"),
    ]  # fmt: skip
