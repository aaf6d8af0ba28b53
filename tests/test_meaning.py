"""What prompts mean: regressions on phrases, a network on texts of known meaning, and the reader made of both."""

import sqlite3
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from recbole_dpr.prompts import meaning
from recbole_dpr.prompts.bank import NO_PROMPT, PromptBank, PromptTable
from recbole_dpr.prompts.meaning import affine, network


def bank(vectors, phrase, about=None, told=(), meant=None):
    told = np.asarray(told, dtype=int)
    meant = np.zeros((len(told), 2), dtype=bool) if meant is None else meant
    return SimpleNamespace(asked=PromptTable(vectors), phrase=phrase, about=about, meaning=told, meant=meant)


def unit(x):
    return torch.nn.functional.normalize(torch.from_numpy(x).float(), dim=1)


def logits(x, hidden, output):
    return affine(torch.nn.functional.gelu(affine(x, hidden)), output)


@pytest.fixture
def phrases():
    """Vectors of 120 phrases, the rows that 40 items have, two categories of these."""
    rng = np.random.default_rng(0)
    phrase = np.arange(120).reshape(40, 3)
    phrase[0] = phrase[5, 1] = NO_PROMPT
    return unit(rng.normal(size=(120, 6))), phrase, torch.from_numpy(rng.random((40, 2)) < [0.3, 0.6])


def test_without_known_meanings_a_logistic_regression_of_phrases(phrases):
    """Each category on its own, as scikit-learn fits it; then how much it counts as meant, about a threshold."""
    vectors, phrase, categories = phrases
    row, column = np.nonzero(phrase != NO_PROMPT)
    x, y = vectors[phrase[row, column]].numpy(), categories[row].numpy()
    found = PromptBank.meaning_reader(bank(vectors, phrase), categories, 0, None)(torch.from_numpy(x)).logit()
    for c in range(2):
        expected = LogisticRegression(C=1.0, tol=1e-6, max_iter=1000).fit(x, y[:, c])
        at_large = np.log(y[:, c].mean() / (1 - y[:, c].mean()))
        meant = 2 * (x @ expected.coef_[0] + expected.intercept_ - (0.3 * at_large + 0.7 * -0.5))
        np.testing.assert_allclose(found[:, c], meant, atol=0.02)


@pytest.mark.parametrize("some", [[1], [0, 1]])
def test_of_known_meanings_a_network(phrases, tmp_path, some):
    """Of the categories that texts are known to mean; the others are read from phrases as if there were no such texts."""
    vectors, phrase, categories = phrases
    rng = np.random.default_rng(1)
    rows, meant = rng.permutation(120)[:50], (rng.random((50, 2)) < 0.4) & np.isin([0, 1], some)
    found = PromptBank.meaning_reader(bank(vectors, phrase, told=rows, meant=meant), categories, 3, tmp_path / "a")(vectors)
    odds = logits(vectors, *network(vectors[rows], torch.from_numpy(meant[:, some]).float(), 3, tmp_path / "b"))
    torch.testing.assert_close(found[:, some], torch.sigmoid(3 * (odds + 2)))
    silent = PromptBank.meaning_reader(bank(vectors, phrase), categories, 3, None)(vectors)
    others = [c for c in (0, 1) if c not in some]
    torch.testing.assert_close(found[:, others], silent[:, others], atol=1e-3, rtol=0)


def test_without_phrases_it_reads_what_items_are_about():
    about, nothing = np.array([NO_PROMPT, 0, 1, 2, 3]), np.full((5, 3), NO_PROMPT)
    vectors, categories = torch.eye(4), torch.tensor([[0], [1], [1], [0], [0]], dtype=torch.bool)
    meant = np.zeros((0, 1), dtype=bool)
    found = PromptBank.meaning_reader(bank(vectors, nothing, about, meant=meant), categories, 0, None)(vectors)[:, 0]
    assert (found[:2] > found[2]).all()
    found = PromptBank.meaning_reader(bank(vectors, nothing, nothing[:, 0], meant=meant), categories, 0, None)(vectors)
    assert (found < 0.01).all()  # nothing is known, nothing is meant


def test_the_network_tells_what_a_linear_map_cannot(tmp_path):
    """A category that is meant where two directions agree in sign, and one that follows a third."""
    rng = np.random.default_rng(0)
    x = unit(rng.normal(size=(4000, 6)))
    y = torch.stack([x[:, 0] * x[:, 1] > 0, x[:, 2] > 0], dim=1)
    linear = affine(x, meaning.regressions(x, y.float(), 12.0)) > 0
    found = logits(x, *network(x[:3000], y[:3000].float(), 0, tmp_path))[3000:] > 0
    assert (linear == y).float().mean(0)[0] < 0.6
    assert ((found == y[3000:]).float().mean(0) > 0.9).all()


def test_a_network_is_trained_once(tmp_path, monkeypatch):
    """Of the same examples and seed; its random numbers are its own."""
    rng = np.random.default_rng(0)
    x, y = unit(rng.normal(size=(60, 6))), torch.from_numpy(rng.random((60, 2)) < 0.4).float()
    before = torch.random.get_rng_state()
    first, again, other = network(x, y, 0, tmp_path / "a"), network(x, y, 0, tmp_path / "b"), network(x, y, 1, tmp_path / "a")
    torch.testing.assert_close(torch.random.get_rng_state(), before)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0], other[0])
    monkeypatch.setattr(meaning, "_train", lambda *_: pytest.fail("trained again"))
    torch.testing.assert_close(network(x, y, 0, tmp_path / "a"), first, rtol=0, atol=0)
    for others in ((x, 1 - y), (x[:30], y[:30])):
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            network(*others, 0, tmp_path / "a")


def test_a_damaged_network_is_trained_anew(tmp_path, caplog):
    rng = np.random.default_rng(0)
    x, y = unit(rng.normal(size=(60, 6))), torch.from_numpy(rng.random((60, 2)) < 0.4).float()
    first = network(x, y, 0, tmp_path)
    with sqlite3.connect(tmp_path / "meanings.sqlite") as db:
        db.execute("UPDATE vectors SET vector = substr(vector, 1, 1000)")
    with caplog.at_level("WARNING"):
        torch.testing.assert_close(network(x, y, 0, tmp_path), first, rtol=0, atol=0)
    assert "meanings.sqlite is damaged" in caplog.text
    caplog.clear()
    network(x, y, 0, tmp_path)
    assert not caplog.text
