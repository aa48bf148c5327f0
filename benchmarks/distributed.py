"""Efficiency of training shared by processes, one thread each: spots a second of 1 and of N processes, in one run.

    python benchmarks/distributed.py [--processes 2] [--size small] [--batch 256] [--spots 2048]

Every measurement is the second epoch of a run of its own (the first one warms up), on random features and counts.
"""

import argparse
import json
import os
import subprocess
import sys
import time

SIZES = {"small": (128, 4, 4), "tiny": (32, 2, 2)}


def measure(options):
    """Train in this process (and those that it starts); the first one prints the seconds of each epoch as JSON."""
    import torch

    from genar import machine, processes
    from genar.genes import Scales
    from genar.genes.scales import default_sizes
    from genar.models import Spots
    from genar.models.genar import GenAR, small
    from genar.training import TrainConfig, fit

    machine.keep_freed_memory()
    torch.set_num_threads(1)
    rank = processes.rank()
    random = torch.Generator().manual_seed(0)
    n, genes = options.spots, 200
    counts = torch.poisson(torch.rand(n, genes, generator=random) * 20, generator=random).long()
    features = torch.randn(n, 1, 1280, generator=random)
    xy = torch.rand(n, 2, generator=random) * 5000
    spots = Spots(features, xy, xy / 5000, torch.arange(n), torch.arange(n) % 4, counts)
    width, depth, heads = SIZES[options.size]
    config = small(n_features=1280, width=width, depth=depth, heads=heads, max_count=127, linear_start=False)
    model = GenAR(config, Scales(tuple(range(genes)), default_sizes(genes)))
    ends = [time.perf_counter()]
    train = TrainConfig(max_epochs=2, batch_size=options.batch)
    fit(
        model, spots, train, log=lambda line: ends.append(time.perf_counter()), group=processes.group(options.processes)
    )
    if not rank:
        print(json.dumps({"seconds": ends[-1] - ends[-2]}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--spots", type=int, default=2048)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return measure(options)
    print("| processes | spots/s | efficiency |\n| --- | --- | --- |")
    alone = None
    for processes in (1, options.processes):
        words = [sys.executable, __file__, "--worker", "--processes", str(processes)]
        for name in ("size", "batch", "spots"):
            words += [f"--{name}", str(getattr(options, name))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr)
        speed = options.spots / json.loads(done.stdout.splitlines()[-1])["seconds"]
        alone = alone or speed
        print(f"| {processes} | {speed:.1f} | {speed / alone / processes:.0%} |", flush=True)


if __name__ == "__main__":
    main()
