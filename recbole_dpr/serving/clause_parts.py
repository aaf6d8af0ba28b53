"""What a clause asks for, whoever asks: found once for each clause, kept in memory.

Legend: N clauses, V items, d hidden, L keys of a clause, S size of the item side.
"""

import torch

from recbole_dpr.serving.memory import Memory

_KEPT_BYTES = 2**26


class ClauseParts:
    """Clauses -> what they hand to the cross-attention, and what they add to the scores of all items.

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

    def __call__(self, clauses):
        """Keys [N, L, d] and their padding, as from `Promptable.keys`; scores [N, V] of the item side, at strength 1."""
        if self._model.token_keys:  # as many keys as tokens: not kept
            prompt, tokens = self.vectors([clause.text for clause in clauses])
            experts = torch.tensor([clause.expert for clause in clauses], device=prompt.device)
            return *self._model.keys(prompt, tokens), self._scores(prompt, experts)
        found = self._known.found(clauses)
        missing = [clause for clause in dict.fromkeys(clauses) if clause not in found]
        if missing:
            prompt, _ = self.vectors([clause.text for clause in missing])
            experts = torch.tensor([clause.expert for clause in missing], device=prompt.device)
            parts = self._model.keys(prompt)[0], self._scores(prompt, experts)
            # copies: a row of a tensor would keep all of it in memory
            found.update((clause, (key.clone(), score.clone())) for clause, key, score in zip(missing, *parts))
        self._known.keep(found)
        keys, scores = zip(*(found[clause] for clause in clauses))
        return torch.stack(keys), None, torch.stack(scores)

    def _scores(self, prompt, experts):
        return self._model.item_side_vectors(prompt, experts) @ self._item_side.T
