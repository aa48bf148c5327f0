"""Ridge regression of log2(1 + count) on the standardised features: the method that a deep one has to beat.

All genes share one penalty, chosen among ``PENALTIES`` by the squared error on left-out training sections; with a
single section, on left-out blocks of it. Neighbouring spots look alike, so leaving out single spots would choose too
small a penalty.
"""

import numpy as np
import torch
from torch import Tensor

from genar.models._base import Batch, Card, ClosedForm, Counts, Spots, log2p1
from genar.models._blocks import in_blocks
from genar.models._decoding import DEFAULT, Decoding
from genar.models._training_spots import left_out_parts, mean_and_scale, scale_of

PENALTIES = tuple(np.logspace(1, 6, 21))


class Ridge(ClosedForm):
    """Closed-form multi-output ridge with an intercept."""

    can_stream = True
    card = Card(
        title="Ridge regression: the method that a deep one has to beat",
        target="log2(1 + count), as here",
        kept="standardised features (the mean of the views), an intercept, one penalty for all genes, chosen on "
        "left-out training sections (of a single one: on strips of it)",
        lost="what is not linear in the features, and whatever a point does not say: it gives no distribution",
    )
    weight: Tensor
    intercept: Tensor
    feature_mean: Tensor
    feature_scale: Tensor
    penalty: Tensor

    def __init__(self, n_features: int, n_genes: int):
        super().__init__(n_features, n_genes)
        for name, shape in (
            ("weight", (n_features, n_genes)),
            ("intercept", (n_genes,)),
            ("feature_mean", (n_features,)),
            ("feature_scale", (n_features,)),
            ("penalty", ()),
        ):
            self.register_buffer(name, torch.zeros(shape))

    def prepare(self, spots: Spots) -> None:
        """Fit on the training spots, each with the mean of its views; of a sample the penalty alone is chosen, and all
        are fitted."""
        self.penalty.fill_(choose_penalty(spots))
        if spots.sample_of is None:
            ((mean, scale, weight, intercept),) = _fit(*_inputs(spots), [float(self.penalty)])
        else:
            mean, scale, weight, intercept = _fit_parts(spots, float(self.penalty))
        for buffer, value in zip(
            (self.feature_mean, self.feature_scale, self.weight, self.intercept),
            (mean, scale, weight, intercept),
            strict=True,
        ):
            buffer.copy_(value)

    def predict(self, batch: Batch, how: Decoding = DEFAULT) -> Counts:
        """The regression's value; spots go through in blocks of one shape."""
        return in_blocks(self._predict_block, batch)

    def _predict_block(self, batch: Batch) -> Counts:
        x = (batch.features - self.feature_mean) / self.feature_scale
        return Counts.from_log2(x @ self.weight + self.intercept)


def choose_penalty(spots: Spots) -> float:
    """The penalty of least squared error on training sections left out in turn (of one section: on strips of it)."""
    x, y = _inputs(spots)
    fold = left_out_parts(spots)
    errors = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for left_out in fold.unique():
        inside, outside = fold != left_out, fold == left_out
        for i, (mean, scale, weight, intercept) in enumerate(_fit(x[inside], y[inside], PENALTIES)):
            predicted = (x[outside] - mean) / scale @ weight + intercept
            errors[i] += (predicted - y[outside]).square().sum()
    return PENALTIES[int(errors.argmin())]


def _inputs(spots: Spots) -> tuple[Tensor, Tensor]:
    """Features [N, F] and log2(1 + count) [N, G], float64."""
    assert spots.counts is not None
    return spots.features.mean(dim=1).double(), log2p1(spots.counts).double()


def _fit_parts(spots: Spots, penalty: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`_fit` gives, of all spots that ``spots`` are a sample of, by sums of products over their parts."""
    around, height = (values.mean(dim=0) for values in _inputs(spots))  # products of what is nearly centred round less
    n, n_spots = len(around), 0
    joint, total = around.new_zeros(n, n + len(height)), around.new_zeros(n + len(height))
    for part in spots.parts():
        x, y = _inputs(part)
        both = torch.cat([x - around, y - height], dim=1)
        joint += both[:, :n].T @ both
        total += both.sum(dim=0)
        n_spots += len(both)
    joint = joint - total[:n, None] * total / n_spots
    scale = scale_of((joint.diagonal() / n_spots).clamp(min=0).sqrt())
    gram, target = joint[:, :n] / (scale[:, None] * scale), joint[:, n:] / scale[:, None]
    weight = torch.linalg.solve(gram + penalty * torch.eye(n, dtype=gram.dtype), target)
    return around + total[:n] / n_spots, scale, weight, height + total[n:] / n_spots


def _fit(x: Tensor, y: Tensor, penalties):
    """For each penalty (mean [F], scale [F], weight [F, G], intercept [G]), all from one decomposition of x [N, F]."""
    mean, scale = mean_and_scale(x)
    intercept = y.mean(dim=0)
    u, s, vh = torch.linalg.svd((x - mean) / scale, full_matrices=False)
    projected = u.T @ (y - intercept)
    for penalty in penalties:
        yield mean, scale, vh.T @ ((s / (s.square() + penalty))[:, None] * projected), intercept


MODEL = Ridge
