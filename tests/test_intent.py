"""Clauses and intents of prompts."""

import pytest

from recbole_dpr.prompts.intent import parse_prompt
from recbole_dpr.prompts.templates import INTENTS, NEGATIVE, POSITIVE, Templates


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a comedy, but no romance", [("a comedy", "positive"), ("romance", "negative")]),
        ("a comedy", [("a comedy", "positive")]),
        ("no horror tonight", [("horror tonight", "negative")]),
        ("a western without gunfights", [("a western", "positive"), ("gunfights", "negative")]),
        ("anything but cartoons", [("cartoons", "negative")]),
        ("I don't want any musicals", [("musicals", "negative")]),
        ("no cartoons, give me a western", [("cartoons", "negative"), ("give me a western", "positive")]),
        ("leave musicals out of it", [("musicals", "negative")]),
        ("bright, witty and warm", [("bright, witty and warm", "positive")]),
    ],
)
def test_clauses(text, expected):
    assert [(c.text, c.intent) for c in parse_prompt(text)] == expected


@pytest.mark.parametrize("text", ["", "   ", None])
def test_nothing_asked(text):
    assert parse_prompt(text or "") == []


@pytest.mark.parametrize("text", ["🎬🍿", "...", "فيلم كوميدي", "x " * 5000, "not", "<script>alert(1)</script>"])
def test_odd_texts_give_an_answer(text):
    clauses = parse_prompt(text)
    assert clauses
    assert all(c.text and c.intent in INTENTS for c in clauses)


def test_templates_are_routed_by_their_pool():
    """The shipped templates, category forms: the share routed right, wholly positive or with a negative clause."""
    templates, right, total = Templates("film"), 0, 0
    for intent in (POSITIVE, NEGATIVE):
        for part in ("train", "eval"):
            for index in range(16):  # behind them are the frames of training
                intents = {c.intent for c in parse_prompt(templates.category(intent, part, index, "Comedy"))}
                total += 1
                right += (INTENTS[NEGATIVE] in intents) == (intent == NEGATIVE)
    assert right / total >= 0.85
