"""What the methods that see one spot at a time share: standardised features, and blocks of one shape."""

import abc

import torch

from genar.models._base import Batch, Counts
from genar.models._blocks import BLOCK, in_blocks
from genar.models._decoding import DEFAULT, Decoding
from genar.models._rival import Rival


class SpotRival(Rival):
    """A method whose spots know nothing of each other. Features come in with mean 0 and standard deviation 1 over the
    training spots."""

    block: int = BLOCK
    """spots that go through at a time in a prediction"""

    @torch.no_grad()
    def predict(self, batch: Batch, how: Decoding = DEFAULT) -> Counts:
        """See :meth:`predict_block`; spots go through in blocks of one shape."""
        return in_blocks(lambda part: self.predict_block(part, how), batch, self.block)

    @abc.abstractmethod
    def predict_block(self, batch: Batch, how: Decoding) -> Counts:
        """Counts of a block of spots."""
