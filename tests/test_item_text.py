"""The items' text: cosine and likelihood of a prompt as one more phrase of an item."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from recbole_dpr.prompts.bank import NO_PROMPT, PromptTable
from recbole_dpr.prompts.item_text import LikelihoodText, MeanText

D = 5


def bank(n_items=40, n_phrases=4, missing=(), seed=0, scatter=(3.0, 0.3, 0.3, 0.3, 0.3), about=False):
    """Items with phrases scattered around a meaning of their own, most of the scatter along the first axis; item 0 has none.

    With `about`, a further text on each item, scattered alike.
    """
    generator = torch.Generator().manual_seed(seed)
    meaning = torch.randn(n_items, 1, D, generator=generator)
    vectors = meaning + torch.tensor(scatter) * torch.randn(n_items, n_phrases + 1, D, generator=generator) + 0.7
    table = np.arange(n_items * (n_phrases + 1)).reshape(n_items, n_phrases + 1)
    table[0] = NO_PROMPT
    for item, column in missing:
        table[item, column] = NO_PROMPT
    rows = table[:, -1] if about else np.full(n_items, NO_PROMPT)
    return SimpleNamespace(phrase=table[:, :-1], about=rows, asked=PromptTable(vectors.reshape(-1, D)))


def fits(text, prompts):
    return prompts @ text.vectors.T + text.offsets


def phrases_of(prompts):
    """[V, K + 1, D], item 0's among them though it has none; the last column is the text on the item."""
    return prompts.asked.vectors.reshape(len(prompts.phrase), -1, D)


def test_mean_text_is_the_cosine():
    prompts = bank(missing=[(3, 1), *((7, column) for column in range(4))], about=True)
    text, phrases = MeanText(prompts), phrases_of(prompts)
    x = torch.nn.functional.normalize(torch.randn(1, D), dim=1)
    expected = torch.cosine_similarity(x, torch.stack([phrases[3][[0, 2, 3]].mean(0), phrases[7, 4]]))
    torch.testing.assert_close(fits(text, x)[0, [3, 7]], expected)
    assert not text.vectors[0].any()


@pytest.mark.parametrize("about", [False, True])
def test_likelihood_is_that_of_the_joint_gaussian(monkeypatch, about):
    """Differences between items equal those of log p(x, all known) - log p(all known) under one Gaussian over all of it."""
    monkeypatch.setattr(LikelihoodText, "_SHRINK_BETWEEN", 1.0)  # multiples of the identity: written down below
    monkeypatch.setattr(LikelihoodText, "_SHRINK_WITHIN", 1.0)
    prompts = bank(scatter=(0.5, 0.4, 0.6, 0.5, 0.5), about=about)
    text, known = LikelihoodText(prompts), phrases_of(prompts)[1:].double()
    phrases, coarse = known[:, :4], known[:, 4]
    mean, apart = phrases.reshape(-1, D).mean(0), phrases - phrases.mean(1, keepdim=True)
    w = (apart**2).sum() / (39 * 3) / D
    noise = torch.einsum("nki,nkj->ij", apart, apart) / (39 * 3) / 4
    level = lambda rows: torch.linalg.eigvalsh(torch.cov(rows.T, correction=0) - noise).clamp(min=0).sum() / D  # noqa: E731
    b, a = level(phrases.mean(1)), level(coarse - phrases.mean(1))

    def log_p(rows, own):  # rows of one item, each axis on its own: covariance b between the looks, w or a for each
        rows = torch.cat([rows - mean, own[None] - coarse.mean(0)]) if about else rows - mean
        each = torch.tensor([w] * (len(rows) - about) + [a] * about)
        covariance = b * torch.ones(len(rows), len(rows)).double() + torch.diag(each)
        return MultivariateNormal(torch.zeros(len(rows)).double(), covariance).log_prob(rows.T).sum()

    x = torch.randn(D).double()
    expected = torch.stack([log_p(torch.cat([x[None], own]), look) - log_p(own, look) for own, look in zip(phrases, coarse)])
    found = fits(text, x.float()[None])[0, 1:].double()
    torch.testing.assert_close(found - found[0], expected - expected[0], rtol=1e-3, atol=1e-3)


def test_likelihood_sees_through_what_varies_within_an_item():
    """Held-out phrases find their item by likelihood far more often than by cosine: one axis is noise."""
    prompts = bank(n_items=200)
    x = phrases_of(prompts)[1:, 4]
    right = {kind: (fits(kind(prompts), x)[:, 1:].argmax(1) == torch.arange(199)).float().mean() for kind in (MeanText, LikelihoodText)}
    assert right[LikelihoodText] > 1.5 * right[MeanText] > 0


@pytest.mark.parametrize("kind", [MeanText, LikelihoodText])
def test_without_a_phrase(kind):
    """An item without a phrase is as if it had never had it; without its only phrase, nothing is left."""
    prompts = bank(missing=[(5, 0), (7, 1), (7, 2), (7, 3)])
    text, phrases = kind(prompts), phrases_of(prompts)
    vectors, offsets = text.without(torch.tensor([4, 7]), torch.stack([phrases[4, 2], phrases[7, 0]]))
    expected = text._side(torch.tensor([4]), phrases[4, [0, 1, 3]].sum(0, keepdim=True), torch.tensor([3]))
    torch.testing.assert_close(vectors[:1], expected[0])
    torch.testing.assert_close(offsets[:1], expected[1])
    torch.testing.assert_close(vectors[1], torch.zeros(D), atol=1e-5, rtol=0)


@pytest.mark.parametrize("about", [False, True])
def test_titles_alone_or_nothing(about):
    """Without phrases, what the items are about still ranks them; without any text nothing is said."""
    prompts = bank(scatter=(0.1,) * D, about=about)
    prompts.phrase[:] = NO_PROMPT
    text = LikelihoodText(prompts)
    assert torch.isfinite(text.vectors).all() and torch.isfinite(text.offsets).all()
    if about:
        again = phrases_of(prompts)[1:, 0]
        assert (fits(text, again)[:, 1:].argmax(1) == torch.arange(39)).float().mean() > 0.9
    else:
        assert not text.vectors.any() and not text.offsets.any()
