"""The user half of the dot product: a history and the clauses of a prompt -> one retrieval vector.

Legend: B requests, T items of a history, N clauses of all requests, D size of the sentence encoder, k size of a
backbone's states, S size of the item side, R size of the retrieval vectors.
"""

import torch
from torch import nn

from recbole_dpr.model.backbones import CausalSASRec
from recbole_dpr.model.paired import PairedSASRec

_FAINTEST = 1e-6  # strength
_PAIRED = 2_000  # items of all histories, up to which both backbones in one pass are quicker than one after the other


class UserTower(nn.Module):
    """What answers requests, in process and exported (`serving.export`).

    Every clause moves the user's resting vector through its expert, each times its strength. What the moves ask of the items'
    text and categories adds up; of the states' part, which meets what the backbones learned of the items, the mean is taken:

        u = (1 - a) plain + a resting + sum_j s_j (prompted_j - resting) / (1 or, in the states' part, n),
        a = min(1, largest s_j),   n = sum_j min(1, s_j) / a

    so strength 0 is the plain backbone exactly, 1 the model as it was trained, and the way between is a straight line; n is the
    number of clauses, of which a fainter one counts in part. Above 1 only what the prompt moves grows; going on along that line
    would soon subtract the unprompted score. The mean is the best of the ways that benchmarks/compound.py compares.

    Args:
        model: Promptable, in eval mode, with the weights that it will answer from.
    """

    def __init__(self, model):
        super().__init__()
        self.model, other = model, model.prompted_backbone
        self._pair = PairedSASRec([model, other]) if isinstance(other, CausalSASRec) else None

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
        prompted = owner.shape[0] > 0
        plain = not prompted or torch.compiler.is_compiling() or self.asks_plain(strength, owner, len(length))
        state, answering = self.states(item_seq, length, prompted, plain)
        if not prompted:
            return self.model.unprompted_vectors(state)
        return self.combined(state, answering, prompt, intent, strength, owner, tokens)

    def asks_plain(self, strength, owner, n_requests):
        """Whether the unprompted state has a weight in the vector of any of `n_requests`, all prompted; strength and owner as for `forward`."""
        if self.model.answering is self.model or self.model.unprompted_weight:
            return True
        strongest = torch.zeros(n_requests, device=strength.device).scatter_reduce(0, owner, strength, "amax")
        return bool((strongest < 1).any())

    def states(self, item_seq, length, prompted, plain=True):
        """States of both backbones; item_seq and length as for `forward`.

        Args:
            prompted: whether any request is; plain: whether the unprompted state is needed.

        Returns:
            [B, k] of the unprompted backbone, None unless plain; [B, k] of the answering one, None unless prompted.
        """
        model, empty, length = self.model, (length == 0)[:, None], length.clamp(min=1)
        exported = torch.compiler.is_compiling()  # for any number of requests
        if plain and prompted and self._pair is not None and not exported and item_seq.numel() <= _PAIRED:
            state, answering = self._pair(item_seq, length)
        else:
            state = model.encode(item_seq, length) if plain else None
            answering = None
            if prompted:
                answering = model.answering.encode(item_seq, length) if model.answering is not model else state
        means = model.mean_states  # for new users
        return tuple(None if found is None else torch.where(empty, mean, found) for mean, found in zip(means, (state, answering)))

    def combined(self, state, answering, prompt, intent, strength, owner, tokens=None):
        """What `forward` returns, from `states`, where any request is prompted."""
        attended = self.model.attended(answering[owner], *self.model.keys(prompt, tokens), intent)
        own = self.own_part(state, answering, attended, intent, strength, owner)
        asked = strength[:, None] * self.model.item_side_vectors(prompt, intent)  # [N, S]
        return torch.cat([own, asked.new_zeros(own.shape[0], asked.shape[1]).index_add(0, owner, asked)], dim=1)

    def own_part(self, state, answering, attended, intent, strength, owner):
        """[B, R - S]: the part of the vectors that meets the backbones' item vectors.

        Args:
            state: [B, k], or None where `asks_plain` says that it does not count; attended: [N, d] as from `Promptable.attended`.
        """
        resting, heard, zero = answering[owner], strength.clamp(max=1.0), torch.zeros_like(answering[:, 0])
        share = zero.scatter_reduce(0, owner, heard, "amax")
        n = (zero.index_add(0, owner, heard) / share.clamp(min=_FAINTEST)).clamp(min=1.0)
        moves = (strength / n[owner])[:, None] * (self.model.moved(resting, attended, intent) - resting)
        if self.model.answering is self.model:  # at rest is plain
            return state.index_add(0, owner, moves)
        share = share[:, None]
        plain = torch.zeros_like(answering) if state is None else (1 - share + share * self.model.unprompted_weight) * state
        return torch.cat([plain, (share * answering).index_add(0, owner, moves)], dim=1)
