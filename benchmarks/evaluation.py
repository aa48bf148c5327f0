"""Seconds and peak memory of bootstrap intervals at the size of the paper's HER2ST set, and of one method's scores.

python benchmarks/evaluation.py [--spots 13620] [--genes 200] [--resamples 1000]
"""

import argparse
import resource
import time

import numpy as np

from genar.evaluation import intervals, metrics
from genar.evaluation.structure import structure


def make_pair(n_spots: int, n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts [N, G] that are over-dispersed and half zero, and a noisy prediction of them."""
    random = np.random.default_rng(0)
    mean = random.gamma(0.6, random.gamma(1, 20, n_genes), (n_spots, n_genes))
    return random.poisson(0.7 * mean + 0.5), random.poisson(mean)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(label: str, call):
    started = time.perf_counter()
    result = call()
    print(f"{label:<34}{time.perf_counter() - started:8.1f} s   peak so far {peak_gib():.2f} GiB", flush=True)
    return result


def main(n_spots: int, n_genes: int, n_resamples: int) -> dict[str, np.ndarray]:
    predicted, truth = make_pair(n_spots, n_genes)
    x, y = metrics.log2p1(predicted), metrics.log2p1(truth)
    side = int(np.ceil(np.sqrt(n_spots)))
    coords = 200.0 * np.stack(np.divmod(np.arange(n_spots), side), axis=1)
    print(f"{n_spots} spots, {n_genes} genes, {n_resamples} resamples; start at {peak_gib():.2f} GiB")
    per_gene = timed("metrics of genes", lambda: metrics.score_genes(x, truth))
    timed("summary", lambda: metrics.summarise(per_gene, predicted, truth))
    timed("structure", lambda: structure(x, y, coords))
    weights = timed("drawing spots", lambda: intervals.resample_weights(n_spots, n_resamples))
    scores = timed("metrics of all resamples", lambda: intervals.resampled_scores(x, y, weights))
    for name, (value, low, high) in intervals.intervals_of(scores).items():
        print(f"{name:<12}{value:8.4f} ({low:.4f} to {high:.4f})")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in (("spots", 13_620), ("genes", 200), ("resamples", 1000)):
        parser.add_argument(f"--{option}", type=int, default=default)
    given = parser.parse_args()
    main(given.spots, given.genes, given.resamples)
