"""States of RecBole's causal backbones at every position of a sequence, from their own forward."""

import torch
from recbole.model.sequential_recommender import SASRec


class AllPositions:
    """Mixin over a causal RecBole model that ends its `forward` with `gather_indexes` (SASRec, GRU4Rec).

    `states` runs that very forward and leaves the gathering out, so nothing of the backbone is copied.
    """

    _keep_positions = False

    def gather_indexes(self, output, gather_index):
        return output if self._keep_positions else super().gather_indexes(output, gather_index)

    def states(self, item_seq):
        """Hidden states after every item of left-aligned sequences.

        Args:
            item_seq: int64 [B, T], padded with 0 on the right.

        Returns:
            float [B, T, d].
        """
        self._keep_positions = True
        try:
            return self.forward(item_seq, torch.ones_like(item_seq[:, 0]))
        finally:
            self._keep_positions = False


class CausalSASRec(AllPositions, SASRec):
    """SASRec (Kang and McAuley, arXiv:1808.09781), RecBole's implementation, with `states`."""
