"""Wishes of two clauses: the tasks of benchmarks/compound.py, by hand and against a brute force, and the ways to combine."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import compound
from recbole_dpr import load
from recbole_dpr.data.dataset import NO_ITEM, Sequences
from recbole_dpr.serving.user_tower import UserTower
from test_targets import rest, sequences

each_form = pytest.mark.parametrize("form", compound.FORMS)


def pairs(data, position, n, form):
    """{(first category, second category): the items that are targets}, by loops."""
    items, next_has = rest(data, position)[:n], data.categories[data.items[position]]
    found, places = {}, range(data.categories.shape[1])
    for first in places:
        for second in places:
            a, b = data.categories[items, first], data.categories[items, second]
            if form == "POS+NEG" and not next_has[first] and next_has[second]:
                fits = a & ~b
            elif form == "POS+POS" and first != second and not next_has[[first, second]].any():
                fits = a & b
            elif form == "NEG+NEG" and first != second and next_has[[first, second]].all():
                fits = ~a & ~b
            else:
                continue
            if fits.any():
                found[first, second] = [item for item, fit in zip(items, fits) if fit]
    return found


@each_form
@settings(max_examples=60, deadline=None)
@given(sequences(), st.integers(1, 6), st.integers(0, 1000))
def test_targets_comply_with_both_clauses(form, data, n, seed):
    position = np.arange(len(data.items))
    found = compound.compound_in_window(data, position, n, form, np.random.default_rng(seed))
    for row, items, category in zip(found.rows, found.items, found.category):
        fitting = pairs(data, row, n, form)[tuple(category)]
        items = items[items != NO_ITEM].tolist()
        assert items == fitting if form == "NEG+NEG" else len(items) == 1 and items[0] in fitting
    for p in set(position) - set(found.rows):
        # where one is drawn first and rules the other out, a position may be lost; else it has no target
        assert not pairs(data, p, n, form) or form != "POS+POS"


def by_hand():
    """One user, all in training: items 1 {a, b}, 2 {c}, 3 {b, c}, 4 {c, d}, 5 {d}."""
    has = ["", "ab", "c", "bc", "cd", "d"]
    return Sequences(
        items=np.array([1, 2, 3, 4, 5]),
        offsets=np.array([0, 5]),
        train_end=np.array([5]),
        valid_end=np.array([5]),
        categories=np.array([[name in row for name in "abcd"] for row in has]),
        category_names=tuple("abcd"),
        item_tokens=np.array([str(i) for i in range(6)]),
        titles=np.full(6, "", dtype=object),
        years=np.full(6, "", dtype=object),
        user_tokens=np.array(["u"]),
    )


@pytest.mark.parametrize(
    ("form", "n", "expected"),
    [
        # item 1 comes next: both its categories to be avoided, items 2, 4, 5 lack them
        ("NEG+NEG", 5, {((0, 1), (2, 4, 5)), ((1, 0), (2, 4, 5))}),
        # only item 4 has two categories that item 1 lacks
        ("POS+POS", 5, {((2, 3), (4,)), ((3, 2), (4,))}),
        # with b avoided, 3 drops out; with a avoided it stays, for its c
        ("POS+NEG", 3, {((2, 0), (2,)), ((2, 0), (3,)), ((2, 1), (2,))}),
    ],
)
def test_targets_by_hand(form, n, expected):
    found = set()
    for seed in range(60):
        drawn = compound.compound_in_window(by_hand(), np.array([0]), n, form, np.random.default_rng(seed))
        items = drawn.items[0]
        found.add((tuple(drawn.category[0].tolist()), tuple(items[items != NO_ITEM].tolist())))
    assert found == expected


@pytest.fixture(scope="module")
def asked(tiny_model):
    """The model, states of three users, and 2, 1 and 2 clauses of theirs."""
    rec = load(tiny_model)
    model, rng = rec.model, np.random.default_rng(0)
    history = torch.from_numpy(rng.integers(1, 81, (3, 5))), torch.tensor([5, 3, 4])
    prompt = torch.from_numpy(rec.prompt_vectors(["a western", "horror", "a drama", "comedy", "western"]))
    with torch.no_grad():
        states = model.encode(*history), model.answering.encode(*history)
    return model, *states, prompt, torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, 0, 1, 2, 2])


@torch.no_grad()
def test_todays_way_is_what_is_served(asked):
    model, plain, answering, prompt, intent, owner = asked
    served = UserTower(model).combined(plain, answering, prompt, intent, torch.ones(5), owner)
    torch.testing.assert_close(compound.COMBINATIONS[compound.TODAY](*asked), served)


@torch.no_grad()
def test_strengths_of_several_clauses(asked):
    """The dial is a straight line up to 1, a clause fades in without a step, and one of strength 0 changes nothing."""
    model, plain, answering, prompt, intent, owner = asked
    tower = UserTower(model)

    def served(*strength):
        return tower.combined(plain, answering, prompt, intent, torch.tensor(strength), owner)

    off, half, full = (served(*[strength] * 5) for strength in (0.0, 0.5, 1.0))
    torch.testing.assert_close(off, model.unprompted_vectors(plain))
    torch.testing.assert_close(half, (off + full) / 2)
    alone = model.prompted_vectors(plain[:1], answering[:1], prompt[:1], intent[:1])
    torch.testing.assert_close(served(1.0, 0.0, 1.0, 1.0, 1.0)[:1], alone)
    torch.testing.assert_close(served(1.0, 1e-4, 1.0, 1.0, 1.0)[:1], alone, atol=1e-4, rtol=0)
    assert (full[:1] - alone).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", compound.COMBINATIONS)
def test_one_clause_is_the_model_as_trained(asked, name):
    model, plain, answering, prompt, intent, _ = asked
    one = model, plain, answering, prompt[:3], intent[:3], torch.arange(3)
    torch.testing.assert_close(compound.COMBINATIONS[name](*one), model.prompted_vectors(*one[1:5]))


@torch.no_grad()
def test_sequential_asks_the_item_side_for_both(asked):
    model, plain, answering, prompt, intent, owner = asked
    side = -model.item_side.shape[1]
    vectors, added = compound.sequential(*asked), compound.COMBINATIONS[compound.TODAY](*asked)
    torch.testing.assert_close(vectors[:, side:], added[:, side:])
    assert not torch.allclose(vectors[0, :side], added[0, :side])  # the state goes through one expert after the other
    torch.testing.assert_close(vectors[1], added[1])


def test_first_clause_only(asked):
    model, plain, answering, prompt, intent, owner = asked
    first = torch.tensor([0, 2, 3])
    with torch.no_grad():
        torch.testing.assert_close(compound.first_clause(*asked), model.prompted_vectors(plain, answering, prompt[first], intent[first]))


def test_the_comparison_runs_on_any_run(tiny_model, capsys):
    compound.main(tiny_model, {})
    text = capsys.readouterr().out
    assert re.findall("### (.*)", text) == [f"{part}, {manner}" for part in ("validation", "test") for manner in ("two clauses given", "one text, through the router")]
    for block in text.split("###")[1:]:
        cells = {row[1].strip(): row[2:] for row in (line.split("|") for line in block.splitlines() if line.startswith("|"))}
        base, bound = ([float(cell.split()[0]) for cell in cells[name][:3]] for name in ("Base", "Filter"))
        assert all(b > a for a, b in zip(base, bound))
