"""What a clause asks for, whoever asks: found once for each clause, kept in memory.

Legend: N clauses, V items, d hidden, k size of a backbone's states, S size of the item side.
"""

import torch

from recbole_dpr.serving.memory import Memory

_KEPT_BYTES = 2**26


class ClauseParts:
    """Clauses -> what the cross-attention makes of them, and what they add to the scores of all items.

    Args:
        model: Promptable, in eval mode; prompts: PromptVectors; item_side: float [V, S].
    """

    def __init__(self, model, prompts, item_side):
        self._model, self._prompts, self._item_side = model, prompts, item_side
        self._known = Memory(_KEPT_BYTES // (4 * max(1, len(item_side))))

    def vectors(self, texts):
        """The sentence vectors [N, D] of clauses' texts, and their tokens as for `Promptable.fuse`, where the model asks for them."""
        device = self._item_side.device
        prompt = torch.from_numpy(self._prompts(texts)).to(device)
        if not self._model.token_keys:
            return prompt, None
        return prompt, tuple(part.to(device) for part in self._prompts.tokens(texts))

    def __call__(self, clauses, state):
        """What is attended [N, d] for the states [N, k] that ask; scores [N, V] of the item side, at strength 1."""
        if self._model.token_keys:  # what is attended depends on the state: not kept
            return self._found(clauses, state)
        found = self._known.found(clauses)
        missing = [clause for clause in dict.fromkeys(clauses) if clause not in found]
        if missing:
            # copies: a row of a tensor would keep all of it in memory
            found.update((clause, (own.clone(), score.clone())) for clause, own, score in zip(missing, *self._found(missing)))
        self._known.keep(found)
        attended, scores = zip(*(found[clause] for clause in clauses))
        return torch.stack(attended), torch.stack(scores)

    def _found(self, clauses, state=None):
        prompt, tokens = self.vectors([clause.text for clause in clauses])
        experts = torch.tensor([clause.expert for clause in clauses], device=prompt.device)
        attended = self._model.attended(state, *self._model.keys(prompt, tokens), experts)
        return attended, self._model.item_side_vectors(prompt, experts) @ self._item_side.T
