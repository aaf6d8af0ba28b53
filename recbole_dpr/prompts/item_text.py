"""The items' text as one vector and one number each: score(prompt, item) = prompt . vector + offset.

Two ways to say how well a prompt fits what is known of an item: the plain cosine, the baseline; and the likelihood of
the prompt as one more phrase of that item, which DPR uses.

Legend: V items, P rows of the prompt table, D encoder size, N pairs of an item and a phrase.
"""

import torch

from recbole_dpr.prompts.bank import NO_PROMPT

_FLOOR = 1e-6  # of a variance


class ItemText:
    """What is known of every item: its training phrases, and what it is about (title and categories).

    Args:
        bank: an embedded PromptBank; device: where the result lies.

    Attributes:
        phrases: int64 [V, K] rows of the prompt table, or `NO_PROMPT`.
        vectors: float32 [V, D]; offsets: float32 [V]; both 0 for an item without text.
    """

    def __init__(self, bank, device="cpu"):
        self.phrases, self._about = torch.from_numpy(self._phrases(bank)), _rows_of(bank.asked, torch.from_numpy(bank.about))
        self._count = (self.phrases != NO_PROMPT).sum(1)
        self._sum = sum(_rows_of(bank.asked, column) for column in self.phrases.T)
        self._fit(bank.asked)
        self.vectors, self.offsets = self._side(slice(None), self._sum, self._count)
        for name, value in vars(self).items():
            setattr(self, name, value.to(device))

    def without(self, items, phrases):
        """The text of items as it is without one of their phrases.

        Args:
            items: int64 [N]; phrases: float32 [N, D], the vector of one phrase of each.

        Returns:
            vectors [N, D], offsets [N].
        """
        return self._side(items, self._sum[items] - phrases, self._count[items] - 1)

    @staticmethod
    def _phrases(bank):
        """int64 [V, K]: the phrases that count as known."""
        return bank.phrase

    def _fit(self, prompts):
        """Of a PromptTable, find what `_side` needs; it is kept as tensors."""

    def _side(self, items, total, count):
        """Vectors and offsets of items from the sums of their phrases and how many they are."""
        raise NotImplementedError


class MeanText(ItemText):
    """The cosine of the prompt and the normed mean of the phrases; of what it is about, for an item without any."""

    def _side(self, items, total, count):
        known = torch.where((count > 0)[:, None], total, self._about[items])
        return torch.nn.functional.normalize(known, dim=-1), total.new_zeros(len(total))


class DescriptionText(ItemText):
    """The cosine of the prompt and the mean of the item's description: title and categories, and each training tag.

    The item's side of CTRL-Rec (arXiv:2510.12742), where a request meets what the catalogue says of an item.
    """

    @staticmethod
    def _phrases(bank):
        return bank.phrase[:, : bank.tag[0].shape[1]]  # without the wishes behind them

    def _side(self, items, total, count):
        return torch.nn.functional.normalize(total + self._about[items], dim=-1), total.new_zeros(len(total))


class LikelihoodText(ItemText):
    """log p(x | all known of the item) - log p(x) of the prompt x, up to what depends on the prompt alone.

    The two-covariance model (Brümmer and de Villiers, "The speaker partitioning problem", Odyssey 2010; a form of
    PLDA): phrase = mean + what the item is + how it happens to be put; both Gaussian, with covariances B between the
    items and W within them. What the item is about is a further, coarser look at what it is, with a covariance A of its
    own. Directions in which phrases of one item differ count little, those in which items differ count much, and a
    cosine takes all alike. Everything is fitted in closed form, so no phrase can be memorised.

    The covariances are shrunk towards multiples of the identity, by shares chosen on validation by wish. Without any
    item that has two phrases, all three are half of the variance of what the items are about.
    """

    _SHRINK_WITHIN, _SHRINK_BETWEEN = 0.6, 0.3

    def _fit(self, prompts):
        several, told = self._count >= 2, self._about.any(dim=1)
        if several.any():
            count = self._count[several]
            self._mean = self._sum[several].sum(0) / count.sum()
            mean_of = self._sum / self._count.clamp(min=1)[:, None]
            size = mean_of.shape[1]
            within = torch.zeros(size, size, dtype=torch.float64)
            for column in self.phrases.T:
                here = several & (column != NO_PROMPT)
                apart = (prompts[column[here]] - mean_of[here]).double()
                within += apart.T @ apart
            within /= (count - 1).sum()
            noise = within * (1 / count.double()).mean()  # of an item's mean phrase
            between = _positive(_covariance(mean_of[several]) - noise)
            both = several & told
            coarse = _positive(_covariance((self._about - mean_of)[both]) - noise) if both.any() else within
        else:
            known = self._about[told] if told.any() else self._about
            self._mean = known.mean(0)
            within = between = coarse = _covariance(known) / 2
        within, coarse = _shrunk(within, self._SHRINK_WITHIN), _shrunk(coarse, self._SHRINK_WITHIN)
        self._per_phrase = torch.linalg.inv(within)
        precision = torch.linalg.inv(_shrunk(between, self._SHRINK_BETWEEN))
        per_look = torch.linalg.inv(coarse)
        centred = (self._about - self._about[told].mean(0)) * told[:, None] if told.any() else self._about
        self._prior = (centred.double() @ per_look).float()  # [V, D], precision-weighted
        precision = precision + per_look if told.any() else precision
        left = [torch.linalg.inv(precision + n * self._per_phrase) for n in range(int(self._count.max()) + 1)]
        self._score = torch.stack([torch.linalg.inv(within + covariance) for covariance in left]).float()  # [n + 1, D, D]
        self._left, self._per_phrase = torch.stack(left).float(), self._per_phrase.float()

    def _side(self, items, total, count):
        evidence = (total - count[:, None] * self._mean) @ self._per_phrase + self._prior[items]
        vectors, offsets = torch.zeros_like(total), total.new_zeros(len(total))
        for n in count.unique().tolist():
            same = torch.nonzero(count == n).squeeze(1)
            estimate = evidence[same] @ self._left[n]
            vector = estimate @ self._score[n]
            vectors[same] = vector
            offsets[same] = -0.5 * (estimate * vector).sum(1) - vector @ self._mean
        return vectors, offsets


def _rows_of(table, rows):
    """The rows of a table, zeros for `NO_PROMPT`."""
    return table[rows.clamp(min=0)] * (rows != NO_PROMPT)[:, None]


def _covariance(rows):
    return torch.cov(rows.double().T, correction=0)


def _positive(covariance):
    """The nearest positive semi-definite matrix."""
    values, axes = torch.linalg.eigh(covariance)
    return (axes * values.clamp(min=0)) @ axes.T


def _shrunk(covariance, share):
    size = len(covariance)
    level = covariance.trace() / size + _FLOOR
    return (1 - share) * covariance + share * level * torch.eye(size, dtype=covariance.dtype)
