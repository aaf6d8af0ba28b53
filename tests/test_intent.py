"""Clauses and intents of prompts: what the routers promise, and how well the default one does on the held-out corpora."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recbole_dpr.errors import UserError
from recbole_dpr.prompts.encoder import wheel_folder
from recbole_dpr.prompts.intent import ROUTERS, parse_prompt, router
from recbole_dpr.prompts.templates import INTENTS, NEGATIVE, POSITIVE, Templates

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from router import judge, read, scores  # noqa: E402

MODEL_FREE = ("tagger", "cues")


def pairs(clauses):
    return [(clause.text, clause.intent) for clause in clauses]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a comedy, but no romance", [("a comedy", "positive"), ("romance", "negative")]),
        ("a comedy", [("a comedy", "positive")]),
        ("a western without gunfights", [("a western", "positive"), ("gunfights", "negative")]),
        ("anything but cartoons", [("cartoons", "negative")]),
        ("I don't want musicals", [("musicals", "negative")]),
        ("no cartoons, give me a western", [("cartoons", "negative"), ("a western", "positive")]),
        ("leave musicals out of it", [("musicals", "negative")]),
        ("I can't get enough of westerns", [("westerns", "positive")]),
        ("a  comedy,\n but no\tromance ", [("a comedy", "positive"), ("romance", "negative")]),
    ],
)
def test_clauses(text, expected):
    assert pairs(parse_prompt(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a comedy, but no romance", [("a comedy", "positive"), ("romance", "negative")]),
        ("no horror tonight", [("horror tonight", "negative")]),
        ("anything but cartoons", [("cartoons", "negative")]),
        ("leave musicals out of it", [("musicals", "negative")]),
        ("bright, witty and warm", [("bright, witty and warm", "positive")]),
    ],
)
def test_cues(text, expected):
    assert pairs(router("cues")(text)) == expected


@pytest.mark.parametrize("name", MODEL_FREE)
@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_nothing_asked(name, text):
    assert router(name)(text) == []


@pytest.mark.parametrize("name", MODEL_FREE)
@pytest.mark.parametrize(
    "text",
    ["🎬🍿", "...", "فيلم كوميدي", "一部喜剧，不要爱情", "x " * 5000, "x" * 10_000, "not", "no", "<script>alert(1)</script>", "half \ud83c of a pair", "é" * 300, "a\0b"],
)
def test_odd_texts_give_an_answer(name, text):
    clauses = router(name)(text)
    assert clauses
    assert all(c.text and c.intent in INTENTS for c in clauses)


def test_clauses_of_a_text_longer_than_a_window():
    """The wish at its end is read as well, and in what comes before nothing is lost."""
    text = "I want a comedy. " + "It rained all day and we stayed in and talked about the garden. " * 40 + "And please, no romance."
    found = pairs(parse_prompt(text))
    assert found[0] == ("a comedy", "positive") and found[-1] == ("romance", "negative")


def test_threads_share_the_router():
    texts = [f"a western like number {n}, but no horror of kind {n}" for n in range(40)]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(parse_prompt, texts))
    assert together == [parse_prompt(text) for text in texts]


def test_an_unknown_router_is_one_clear_line():
    with pytest.raises(UserError, match="intent_router=.*'taggr'.*tagger"):
        router("taggr")


def test_templates_are_routed_by_their_pool():
    """The shipped templates, category forms: the share routed right, wholly positive or with a negative clause."""
    templates, right, total = Templates("film"), 0, 0
    for intent in (POSITIVE, NEGATIVE):
        for part in ("train", "eval"):
            for index in range(16):  # behind them are the frames of training
                intents = {c.intent for c in parse_prompt(templates.category(intent, part, index, "Comedy"))}
                total += 1
                right += intents == {INTENTS[intent]}
    assert right / total >= 0.9


# --- the paper's router, on a stand-in for its model


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A model of the right kind, tiny and with weights drawn at random."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("nli")
    labels = dict(enumerate(("contradiction", "neutral", "entailment")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = BertConfig(vocab_size=30522, **sizes, id2label=labels, label2id={name: n for n, name in labels.items()})
        BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(wheel_folder()).save_pretrained(folder)
    return folder


def test_nli_takes_the_whole_prompt_with_the_label_that_is_entailed(stand_in, monkeypatch):
    route = router("nli", str(stand_in))
    (clause,) = route("a comedy,  but no romance")
    assert clause.text == "a comedy, but no romance" and clause.intent in INTENTS
    from recbole_dpr.prompts.intent import _LOADED

    asked = []

    def classify(text, labels, hypothesis_template):
        asked.append((text, labels, hypothesis_template))
        return {"labels": ["negative preference", "positive preference"], "scores": [0.9, 0.1]}

    monkeypatch.setattr(_LOADED["nli", str(stand_in)], "_classify", classify)
    assert pairs(route("no horror")) == [("no horror", "negative")]
    assert asked == [("no horror", ["positive preference", "negative preference"], "This text expresses a {}.")]


def test_an_nli_model_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="intent_model=.*intent_router=tagger"):
        router("nli", str(tmp_path / "nothing"))


def test_every_router_is_a_choice_of_the_key():
    from recbole_dpr.config import _CHOICES

    assert _CHOICES["intent_router"] == tuple(ROUTERS)


# --- golden: what docs/router.md reports, a little below


@pytest.mark.parametrize(("name", "intent", "split"), [("intents_heldout", 0.69, 0.55), ("intents_heldout2", 0.77, 0.77)])
def test_held_out_corpora(name, intent, split):
    found = scores([judge(clauses, parse_prompt(text)) for text, clauses, *_ in read(name)])
    assert found["intent"] >= intent
    assert found["split"] >= split
