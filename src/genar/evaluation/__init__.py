"""Score any prediction against the truth, whoever made it: two AnnData, aligned by spot and gene name."""

from genar.evaluation.scoring import Scores, align, score, score_aligned, write_scores

__all__ = ["Scores", "align", "score", "score_aligned", "write_scores"]
