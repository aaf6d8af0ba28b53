"""The items' text: cosine and likelihood of a prompt as one more phrase of an item."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from recbole_dpr.prompts.bank import NO_PROMPT
from recbole_dpr.prompts.item_text import LikelihoodText, MeanText

D = 5


def bank(n_items=40, n_phrases=4, missing=(), seed=0, within=None):
    """Items with phrases scattered around a meaning of their own, most of the scatter along the first axis; item 0 has none."""
    generator = torch.Generator().manual_seed(seed)
    scatter = torch.tensor([3.0, 0.3, 0.3, 0.3, 0.3]) if within is None else within
    meaning = torch.randn(n_items, 1, D, generator=generator)
    vectors = meaning + scatter * torch.randn(n_items, n_phrases, D, generator=generator) + 0.7
    table = np.arange(n_items * n_phrases).reshape(n_items, n_phrases)
    table[0] = NO_PROMPT
    for item, column in missing:
        table[item, column] = NO_PROMPT
    return SimpleNamespace(item_phrases=lambda: table, vectors=vectors.reshape(-1, D))


def fits(text, prompts):
    return prompts @ text.vectors.T + text.offsets


def test_mean_text_is_the_cosine():
    prompts = bank(missing=[(3, 1)])
    text, phrases = MeanText(prompts), prompts.vectors.reshape(40, 4, D)
    x = torch.nn.functional.normalize(torch.randn(1, D), dim=1)
    expected = torch.cosine_similarity(x, phrases[3][[0, 2, 3]].mean(0, keepdim=True))
    torch.testing.assert_close(fits(text, x)[:, 3], expected)
    assert not text.vectors[0].any()


def test_likelihood_is_that_of_the_joint_gaussian(monkeypatch):
    """Differences between items equal those of log p(x, phrases) - log p(phrases) under one Gaussian over all of them."""
    monkeypatch.setattr(LikelihoodText, "_SHRINK_BETWEEN", 1.0)  # B a multiple of the identity, W one too: known below
    monkeypatch.setattr(LikelihoodText, "_SHRINK_WITHIN", 1.0)
    prompts = bank()
    text, phrases = LikelihoodText(prompts), prompts.vectors.reshape(40, 4, D)[1:].double()
    mean = phrases.reshape(-1, D).mean(0)
    apart = phrases - phrases.mean(1, keepdim=True)
    w = (apart**2).sum() / (39 * 3) / D
    centred = phrases.mean(1) - mean
    spread = torch.linalg.eigvalsh(centred.T @ centred / 39 - torch.einsum("nki,nkj->ij", apart, apart) / (39 * 3) / 4)
    b = spread.clamp(min=0).sum() / D

    def log_p(rows):  # [n, D] phrases of one item: independent axes, each with covariance b + w on the diagonal, b off it
        covariance = b * torch.ones(len(rows), len(rows)).double() + w * torch.eye(len(rows))
        return MultivariateNormal(torch.zeros(len(rows)).double(), covariance).log_prob((rows - mean).T).sum()

    x = torch.randn(D).double()
    expected = torch.stack([log_p(torch.cat([own, x[None]])) - log_p(own) for own in phrases])
    found = fits(text, x.float()[None])[0, 1:].double()
    torch.testing.assert_close(found - found[0], expected - expected[0], rtol=1e-3, atol=1e-3)


def test_likelihood_sees_through_what_varies_within_an_item():
    """Held-out phrases find their item by likelihood far more often than by cosine: one axis is noise."""
    all_phrases = bank(n_items=200, n_phrases=5)
    table = all_phrases.item_phrases()
    known = SimpleNamespace(item_phrases=lambda: table[:, :4], vectors=all_phrases.vectors)
    x = all_phrases.vectors[table[1:, 4]]
    right = {kind: (fits(kind(known), x)[:, 1:].argmax(1) == torch.arange(199)).float().mean() for kind in (MeanText, LikelihoodText)}
    assert right[LikelihoodText] > 1.5 * right[MeanText] > 0


@pytest.mark.parametrize("kind", [MeanText, LikelihoodText])
def test_without_a_phrase(kind):
    """The side of an item without a phrase is that of an item that never had it; without its only phrase, nothing is left."""
    prompts = bank(missing=[(5, 0), (7, 1), (7, 2), (7, 3)])
    text = kind(prompts)
    vectors, offsets = text.without(torch.tensor([4, 7]), prompts.vectors[[4 * 4 + 2, 7 * 4]])
    own = prompts.vectors.reshape(40, 4, D)[4][[0, 1, 3]]
    expected = text._side(own.sum(0, keepdim=True), torch.tensor([3]))
    torch.testing.assert_close(vectors[:1], expected[0])
    torch.testing.assert_close(offsets[:1], expected[1])
    torch.testing.assert_close(vectors[1], torch.zeros(D), atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_phrases", [0, 1])
def test_titles_alone_or_nothing(n_phrases):
    """Without an item of two phrases the model still ranks; without any text it says nothing."""
    prompts = bank(n_phrases=max(1, n_phrases), within=torch.full((D,), 0.1))
    if not n_phrases:
        table = np.full((40, 1), NO_PROMPT)
        prompts.item_phrases = lambda: table
    text = LikelihoodText(prompts)
    assert torch.isfinite(text.vectors).all() and torch.isfinite(text.offsets).all()
    if n_phrases:
        again = prompts.vectors[1:] + 0.05
        assert (fits(text, again)[:, 1:].argmax(1) == torch.arange(39)).float().mean() > 0.9
    else:
        assert not text.vectors.any() and not text.offsets.any()
