"""The training frames, and those of the tagger: complete, well formed, intent plain, worded apart from the eval pools."""

import re
from itertools import combinations, product

import pytest
from test_template_pools import (
    FILES,
    INTENTS,
    NEGATION_CUE,
    jaccard,
    load,
    normalise,
    placeholders,
    prose,
    templates,
)

FRAMES, TAGGER_FRAMES, CATEGORY_FRAMES, CHATTER = map(load, ("frames", "tagger_frames", "category_frames", "chatter"))
COUNTS = {"positive": 120, "negative": 80}
TAGGER_COUNTS = {"positive": 308, "negative": 203}
CATEGORY_COUNTS = {"positive": 170, "negative": 114}
CHATTER_COUNTS = {"before": 70, "after": 50}
MAX_JACCARD_EVAL = 0.5
MAX_JACCARD_WITHIN = 0.6
MIN_WORDS, MAX_WORDS = 2, 22  # around the tag
EITHER = {intent: FRAMES[intent] + TAGGER_FRAMES[intent] + CATEGORY_FRAMES[intent] for intent in INTENTS}

each_intent = pytest.mark.parametrize("intent", INTENTS)


def test_counts():
    assert {intent: len(frames) for intent, frames in FRAMES.items()} == COUNTS
    assert {intent: len(frames) for intent, frames in TAGGER_FRAMES.items()} == TAGGER_COUNTS
    assert {intent: len(frames) for intent, frames in CATEGORY_FRAMES.items()} == CATEGORY_COUNTS
    assert {place: len(chatter) for place, chatter in CHATTER.items()} == CHATTER_COUNTS


@each_intent
def test_well_formed(intent):
    for frame in EITHER[intent]:
        assert isinstance(frame, str) and frame == " ".join(frame.split())
        assert not set("{}") & set(frame.format(tag="lost dog", category="comedy", a_category="a comedy")), frame
    for frame in FRAMES[intent] + TAGGER_FRAMES[intent]:
        assert placeholders(frame) == ["{tag}"], frame
    for frame in CATEGORY_FRAMES[intent]:
        assert placeholders(frame) in (["{category}"], ["{a_category}"]), frame
    for frame in FRAMES[intent]:
        assert MIN_WORDS <= len(normalise(frame).split()) <= MAX_WORDS, frame


def test_no_frame_twice():
    keys = [normalise(frame) for intent in INTENTS for frame in EITHER[intent]]
    assert len(keys) == len(set(keys))


@each_intent
def test_frames_vary(intent):
    for a, b in combinations(EITHER[intent], 2):
        assert jaccard(a, b) <= MAX_JACCARD_WITHIN, (a, b)


@pytest.mark.parametrize(("name", "intent"), list(product(FILES, INTENTS)))
def test_apart_from_the_eval_templates(name, intent):
    held_out = {normalise(t) for i in INTENTS for t in templates(name, i, "eval")}
    for frame in EITHER[intent]:
        assert normalise(frame) not in held_out, frame
        for template in templates(name, intent, "eval"):
            assert jaccard(frame, template) <= MAX_JACCARD_EVAL, (frame, template)


def test_positive_frames_hold_no_negation_cue():
    for frame in FRAMES["positive"]:
        cue = NEGATION_CUE.search(prose(frame))
        assert cue is None, (frame, cue.group())


def test_negative_frames_hold_a_negation_cue():
    for frame in FRAMES["negative"]:
        assert NEGATION_CUE.search(prose(frame)), frame


def test_small_talk_is_apart_from_the_eval_templates():
    for chatter, name in product(CHATTER["before"] + CHATTER["after"], FILES):
        assert isinstance(chatter, str) and chatter == chatter.strip() and not placeholders(chatter)
        assert all(jaccard(chatter, t) <= MAX_JACCARD_EVAL for i in INTENTS for t in templates(name, i, "eval")), chatter


@each_intent
def test_no_frame_names_a_genre(intent):
    """It would ask for that one too."""
    genres = re.compile(r"\b(action|adventure|animation|children|comedy|crime|documentary|drama|fantasy|horror|musical|mystery|romance|sci-fi|thriller|war|western)\b", re.I)
    for frame in EITHER[intent] + CHATTER["before"] + CHATTER["after"]:
        assert not genres.search(frame), frame
