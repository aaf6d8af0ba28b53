"""The user half of the dot product: a history and the clauses of a prompt -> one retrieval vector.

Legend: B requests, T items of a history, N clauses of all requests, D size of the sentence encoder, R size of the
retrieval vectors.
"""

import torch
from torch import nn


class UserTower(nn.Module):
    """What answers requests, in process and exported (`serving.export`).

    Every clause moves the user's resting vector through its expert, and the moves add up, each times its strength:

        u = (1 - a) plain + a resting + sum_j s_j (prompted_j - resting),   a = min(1, largest s_j)

    so strength 0 is the plain backbone exactly, 1 the model as it was trained, and the way between is a straight line.
    Above 1 only what the prompt moves grows; going on along that line would soon subtract the unprompted score.

    Args:
        model: Promptable, in eval mode.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, item_seq, length, prompt, intent, strength, owner, tokens=None):
        """The vectors of B requests.

        Args:
            item_seq: int64 [B, T], oldest first, padded with 0 on the right; length: int64 [B], 0 for a new user.
            prompt: float [N, D] clause vectors; strength: float [N].
            intent: int64 [N], 0 positive, 1 negative, or an int for all clauses: then one expert is asked, not both.
            owner: int64 [N], the request that a clause belongs to.
            tokens: as for `Promptable.fuse`.

        Returns:
            float [B, R].
        """
        model, empty, length = self.model, (length == 0)[:, None], length.clamp(min=1)
        state = torch.where(empty, model.mean_states[0], model.encode(item_seq, length))
        if owner.shape[0] == 0:
            return model.unprompted_vectors(state)
        answering = torch.where(empty, model.mean_states[1], model.answering.encode(item_seq, length))
        return self.combined(state, answering, prompt, intent, strength, owner, tokens)

    def combined(self, state, answering, prompt, intent, strength, owner, tokens=None):
        """The same from states [B, k] of the unprompted backbone and of the answering one."""
        model, plain = self.model, self.model.unprompted_vectors(state)
        resting = model.resting_vectors(state, answering)
        moves = model.prompted_vectors(state[owner], answering[owner], prompt, intent, tokens) - resting[owner]  # [N, R]
        share = torch.zeros_like(plain[:, 0]).scatter_reduce(0, owner, strength.clamp(max=1.0), "amax")[:, None]
        return ((1 - share) * plain + share * resting).index_add(0, owner, strength[:, None] * moves)
