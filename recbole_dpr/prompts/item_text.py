"""The items' text as one vector and one number each: score(prompt, item) = prompt . vector + offset.

Two ways to say how well a prompt fits an item's phrases: their plain cosine, the baseline; and the likelihood of the
prompt as one more phrase of that item, which DPR uses.

Legend: V items, P rows of the prompt table, D encoder size, N pairs of an item and a phrase.
"""

import torch

from recbole_dpr.prompts.bank import NO_PROMPT

_RIDGE = 1e-6


class ItemText:
    """What is known of every item by its training phrases, or by its title where it has none.

    Args:
        bank: an embedded PromptBank.

    Attributes:
        vectors: float32 [V, D]; offsets: float32 [V]; both 0 for an item without text.
    """

    def __init__(self, bank, device="cpu"):
        table, prompts = bank.item_phrases(), bank.vectors
        present = table != NO_PROMPT
        self._count = torch.from_numpy(present.sum(axis=1))
        self._sum = torch.zeros(len(table), prompts.shape[1])
        for rows, real in zip(table.T, present.T):
            self._sum[real] += prompts[rows[real]]
        self._prepare(prompts, table, present)
        self.vectors, self.offsets = self._side(self._sum, self._count)
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))

    def without(self, items, phrases):
        """The text of items as it is without one of their phrases.

        Args:
            items: int64 [N]; phrases: float32 [N, D], the vector of one phrase of each.

        Returns:
            vectors [N, D], offsets [N].
        """
        return self._side(self._sum[items] - phrases, self._count[items] - 1)

    def _prepare(self, prompts, table, present):
        """Fit what `_side` needs; it is kept as tensors."""

    def _side(self, total, count):
        """Vectors and offsets from sums of phrases [..., D] and how many they are."""
        raise NotImplementedError


class MeanText(ItemText):
    """The cosine of the prompt and the normed mean of the phrases."""

    def _side(self, total, count):
        return torch.nn.functional.normalize(total, dim=-1), total.new_zeros(len(total))


class LikelihoodText(ItemText):
    """log p(x | the item's phrases) - log p(x) of the prompt x, up to what depends on the prompt alone.

    The two-covariance model (Brümmer and de Villiers, "The speaker partitioning problem", Odyssey 2010; a form of
    PLDA): phrase = mean + what the item is + how it happens to be put; both Gaussian, with covariances B between the
    items and W within them. Directions in which phrases of one item differ count little, those in which items differ
    count much, and a cosine takes all alike. Everything is fitted in closed form, so no phrase can be memorised.

    The covariances are shrunk: W towards a multiple of the identity, B towards one of its own, the shares chosen on
    validation by wish. Without any item that has two phrases, half of the variance is taken to be within.
    """

    _SHRINK_WITHIN, _SHRINK_BETWEEN = 0.6, 0.3

    def _prepare(self, prompts, table, present):
        several = self._count >= 2
        rows = torch.from_numpy(table)[several]
        if several.any():
            real = rows != NO_PROMPT
            count = self._count[several]
            mean_of = self._sum[several] / count[:, None]
            within = torch.zeros(prompts.shape[1], prompts.shape[1], dtype=torch.float64)
            for column, there in zip(rows.T, real.T):
                apart = (prompts[column[there]] - mean_of[there]).double()
                within += apart.T @ apart
            within /= (count - 1).sum()
            between = _covariance(mean_of) - within * (1 / count.double()).mean()
            self._mean = self._sum[several].sum(0) / count.sum()
        else:
            known = self._sum[self._count > 0] if self._count.any() else self._sum
            within = between = _covariance(known) / 2
            self._mean = known.mean(0)
        values, axes = torch.linalg.eigh(between)
        between = (axes * values.clamp(min=0)) @ axes.T
        within, between = _shrunk(within, self._SHRINK_WITHIN), _shrunk(between, self._SHRINK_BETWEEN)
        estimates, scores = [], []
        for n in range(int(self._count.max()) + 1):
            gain = torch.linalg.solve(within + n * between, between).T  # B (W + n B)^-1: sum of n phrases -> estimate
            left = between - n * gain @ between  # covariance that the n phrases leave
            estimates.append(gain)
            scores.append(torch.linalg.inv(within + left))
        self._estimate, self._score = torch.stack(estimates).float(), torch.stack(scores).float()  # [n + 1, D, D]

    def _side(self, total, count):
        vectors, offsets = torch.zeros_like(total), total.new_zeros(len(total))
        for n in count.unique().tolist():
            if n == 0:
                continue
            same = torch.nonzero(count == n).squeeze(1)
            estimate = (total[same] - n * self._mean) @ self._estimate[n].T
            vector = estimate @ self._score[n]
            vectors[same] = vector
            offsets[same] = -0.5 * (estimate * vector).sum(1) - vector @ self._mean
        return vectors, offsets


def _covariance(rows):
    return torch.cov(rows.double().T, correction=0)


def _shrunk(covariance, share):
    size = len(covariance)
    level = covariance.trace() / size + _RIDGE
    return (1 - share) * covariance + share * level * torch.eye(size, dtype=covariance.dtype)
