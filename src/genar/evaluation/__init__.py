"""Score any prediction against the truth, whoever made it: two AnnData, aligned by spot and gene name."""

from genar.evaluation.scoring import (
    MEAN_SUFFIX,
    Aligned,
    Scores,
    align,
    align_both,
    score,
    score_aligned,
    write_scores,
)

__all__ = ["MEAN_SUFFIX", "Aligned", "Scores", "align", "align_both", "score", "score_aligned", "write_scores"]
