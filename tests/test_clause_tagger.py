"""The tagger of clauses: its encoder, its sums over label sequences, its windows, and the file that it comes in."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_dpr.errors import UserError
from recbole_dpr.prompts import clause_tagger
from recbole_dpr.prompts.clause_tagger import apply, changes
from recbole_dpr.prompts.encoder import wheel_folder


@pytest.fixture(scope="module")
def plain():
    """A Reader over the encoder as it comes, with transitions drawn at random."""
    reader = clause_tagger.untrained()
    torch.nn.init.normal_(reader.tagger.transitions, generator=torch.Generator().manual_seed(1))
    return reader


@torch.no_grad()
def test_encoder_is_berts(plain):
    from transformers import AutoModel

    bert = AutoModel.from_pretrained(wheel_folder(), add_pooling_layer=False).eval()
    pieces = torch.randint(1000, 20_000, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(pieces, dtype=torch.bool)
    mask[1, 5:] = False
    theirs = bert(pieces, mask.long()).last_hidden_state
    torch.testing.assert_close(plain.tagger.states(pieces, mask)[mask], theirs[mask], atol=1e-4, rtol=0)


def legal(labels):
    """A clause goes on only where one of its intent began."""
    return all(label not in (2, 4) or before in (label - 1, label) for before, label in zip((0, *labels), labels))


@torch.no_grad()
def test_loss_and_best_are_those_of_all_sequences_listed(plain):
    tagger, scores = plain.tagger, torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2))
    labels, lengths = torch.tensor([[0, 1, 2, 3], [3, 4, 0, 0]]), torch.tensor([4, 3])
    expected = []
    for row, length in enumerate(lengths.tolist()):
        every = [own for own in product(range(5), repeat=length) if legal(own)]
        sums = torch.tensor([sum(scores[row, w, label] + tagger.transitions[before, label] for w, (before, label) in enumerate(zip((0, *own), own))) for own in every])
        expected.append(torch.logsumexp(sums, 0) - sums[every.index(tuple(labels[row, :length].tolist()))])
        assert tuple(tagger.best(scores[row, :length].numpy())) == every[int(sums.argmax())]
    torch.testing.assert_close(tagger.loss(scores, labels, lengths), torch.stack(expected).mean(), atol=1e-4, rtol=0)


def test_a_student_learns_the_sequences_of_its_teacher(plain, monkeypatch):
    """Its loss is the cross-entropy of all sequences listed, and has no slope where it scores them as its teacher does."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import train_router

    texts, lengths = [[("no blood today", None)], [("tea", "positive")]], torch.tensor([3, 1])
    labels, pairs = train_router.opinion(plain, texts, lengths)
    torch.testing.assert_close(labels.sum(2), (torch.arange(3) < lengths[:, None]).float(), atol=1e-4, rtol=0)
    tagger = plain.tagger
    with torch.no_grad():
        own = tagger(*clause_tagger.collate([plain.windows(text[0][0])[0] for text in texts]))
    other = torch.randn(own.shape, generator=torch.Generator().manual_seed(3))
    expected = 0.0
    for row, length in enumerate(lengths.tolist()):
        every = [labels for labels in product(range(5), repeat=length) if legal(labels)]
        odds = [
            torch.stack([sum(scores[row, w, label] + tagger.transitions[before, label] for w, (before, label) in enumerate(zip((0, *labels), labels))) for labels in every])
            for scores in (own, other)
        ]
        expected -= (odds[0].softmax(0) * odds[1].log_softmax(0)).sum() / len(texts)
    torch.testing.assert_close(train_router.soft_loss(tagger, other, lengths, labels, pairs), expected, atol=1e-4, rtol=0)
    own.requires_grad_()
    (slope,) = torch.autograd.grad(train_router.soft_loss(tagger, own, lengths, labels, pairs), own)
    assert slope.abs().max() < 1e-4


def test_windows_hold_every_word_once_and_end_with_sentences(plain):
    text = "It rained all day. We want a western, please! " * 40
    windows = plain.windows(text)
    assert len(windows) > 2
    assert max(len(window.pieces) for window in windows) <= 128
    words = [text[start:end] for window in windows for start, end in window.places]
    assert "".join(words) == "".join(text.split())
    assert all(text[window.places[-1][0]] in ".!" for window in windows)


def test_windows_of_a_text_without_sentences(plain):
    windows = plain.windows("word " * 500)
    assert sum(len(window.first) for window in windows) == 500
    assert max(len(window.pieces) for window in windows) <= 128


def test_changes_come_back_from_the_file(plain):
    """A layer's weights to half a step of their group of 64, all else as it was, and what was not trained untouched."""
    before, rng = dict(plain.tagger.named_parameters()), torch.Generator().manual_seed(3)
    name, bias, untouched = "layers.5.wide.weight", "layers.5.wide.bias", "layers.4.wide.weight"
    change = torch.randn(before[name].shape, generator=rng) / 100
    change[0] = 0  # as of a weight that did not move
    found = changes(plain.tagger, {name: before[name].detach() + change, bias: torch.ones_like(before[bias])})
    assert {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in found.items()} == {
        f"{name}.steps": ((1536, 192), torch.uint8), f"{name}.scales": ((1536, 6), torch.float16), bias: ((1536,), torch.float16),
    }  # fmt: skip
    other = clause_tagger.untrained().tagger
    apply(other, found)
    after = dict(other.named_parameters())
    error = (after[name] - before[name] - change).detach().abs().unflatten(1, (-1, 64))
    assert (error <= 0.505 * found[f"{name}.scales"].float()[..., None] + 1e-6).all()
    assert torch.equal(after[bias], torch.ones(1536)) and torch.equal(after[untouched], before[untouched])


def test_half_precision_reads_as_full(monkeypatch):
    texts = ["a comedy, but no romance", "I'd rather avoid clowns, a quiet film about bees would do", "spare me musicals"]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(clause_tagger, "compute_dtype", lambda *_, dtype=dtype: dtype)
        found.append(clause_tagger.load().places(texts))
    assert found[0] == found[1]


def test_a_text_reads_alike_alone_and_among_others():
    reader = clause_tagger.load()
    texts = ["a comedy, but no romance", "spare me musicals", "something slow and quiet about a lighthouse keeper, please; no ghosts in it"]
    assert reader.places(texts) == [reader.places([text])[0] for text in texts]


def test_loading_leaves_the_draws_of_a_run_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    clause_tagger.load()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_damaged_weights(tmp_path, damage):
    path = tmp_path / "tagger.safetensors"
    whole = clause_tagger.WEIGHTS.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:1000])
    elif damage == "other":
        from safetensors.numpy import save_file

        save_file({"something": np.zeros(3)}, path)
    with pytest.raises(UserError, match="missing or damaged.*intent_router=cues"):
        clause_tagger.load(path)


def test_a_clause_needs_more_than_even_odds_to_begin(monkeypatch):
    """A word that begins one with log-odds of .9 is outside, with 1.1 it is a clause."""
    plain = clause_tagger.untrained()
    for odds, found in ((0.9, [(0, 8, 0)]), (1.1, [(5, 8, 0)])):  # where there is none, the whole text is one
        scores = torch.tensor([[0.0, -5, -5, -5, -5], [0.0, odds, -5, -5, -5]])
        monkeypatch.setattr(plain.tagger, "forward", lambda *_, scores=scores: scores[None])
        assert plain.places(["some tea"]) == [found]


def test_the_file_is_small():
    assert clause_tagger.WEIGHTS.stat().st_size <= 5_800_000


@pytest.mark.parametrize(("text", "second", "intents"), [
    ("tea or cake", 0.3, [0, 0]), ("tea, cake", 0.3, [0, 0]), ("tea & cake", 0.3, [0, 0]),
    ("tea yet cake", 0.3, [0, 1]), ("tea. cake", 0.3, [0, 1]), ("tea or cake", 4.0, [0, 1]),
])  # fmt: skip
def test_clauses_side_by_side_agree_unless_they_are_sure(text, second, intents):
    """The first is wanted for sure; the second is refused by log-odds `second`, which a link outweighs up to 1."""
    words = [*re.finditer(r"\w+|[^\w\s]", text)]
    labels = [1, *[0] * (len(words) - 2), 3]
    scores = np.zeros((len(words), 5), dtype=np.float32)
    scores[0, [1, 3]], scores[-1, 3] = (9, 0), second
    places = [match.span() for match in words]
    assert [intent for _, _, intent in clause_tagger._stretches(labels, scores, places, text)] == intents
