"""The description inside a prompt: where it is in the training sentences, how a stretch is chosen, and that sentences never seen lose what is around it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_dpr.errors import UserError
from recbole_dpr.prompts import description
from recbole_dpr.prompts.bank import NO_PROMPT, PromptBank
from recbole_dpr.prompts.encoder import PromptEncoder
from recbole_dpr.prompts.tags import load_item_texts
from recbole_dpr.prompts.templates import Templates

SENTENCES = {
    "Surely you have {} somewhere in your archive?": "a lighthouse keeper who adopts a seal",
    "Nothing beats {} on a rainy day, so send me some.": "quiet revenge among Venetian glass blowers",
    "hello, could you find {} for my grandmother": "old trains crossing the Alps",
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return PromptEncoder(cache_dir=tmp_path_factory.mktemp("cache"), precision="float32")


def bank(n_items=300, about=""):
    ids = np.array(["[PAD]", *map(str, range(1, n_items + 1))])
    blank = np.full(len(ids), "", dtype=object)
    texts = replace(load_item_texts(None if about else "movielens", ids, blank, blank, "ml1m_id"), meanings=[])
    names = ("Comedy", "Sci-Fi", "Action")
    return PromptBank(Templates("film"), texts, names, np.where(ids == "[PAD]", "", about), np.random.default_rng(0), carried=False)


@pytest.fixture(scope="module")
def tagger(encoder):
    return description.fitted(encoder, few_examples(), 0)


def few_examples():
    """A quarter of what a run has: enough, and quick."""
    found = description.examples(bank(), np.random.default_rng(0))
    return [found[row] for row in np.random.default_rng(0).permutation(len(found))[:1500]]


def test_examples_say_where_the_description_is():
    """It is a training phrase or a category's name, and what is around it is a sentence of training, amid small talk at times."""
    prompts = bank()
    found = description.examples(prompts, np.random.default_rng(0))
    tags, wishes = (set(filter(None, texts["train"].ravel())) for texts in (prompts.texts.tags, prompts.texts.wishes))
    held_out = {text.lower() for part in ("valid", "eval") for text in prompts.texts.wishes[part].ravel()}
    tags = {tag[:1].lower() + tag[1:].rstrip(".") for tag in tags} | tags
    forms = {form for intent in (0, 1) for form in prompts.templates.tagger_carriers(intent)}
    names = {name.lower() for name in prompts.category_names}
    before, after = (["", *prompts.templates.chatter[place]] for place in ("before", "after"))
    parts = amid = 0
    for example in found:
        inside = example.text[example.start : example.end]
        assert inside in tags or inside in wishes or inside.lower() in names, inside
        assert inside.lower() not in held_out
        around = {
            example.text[: example.start].removeprefix(said).lstrip() + "{tag}" + example.text[example.end :].removesuffix(more).rstrip()
            for said in before
            for more in after
        }
        if inside in tags and around & forms:
            parts += 1
        amid += example.text.startswith(tuple(before[1:]))
    distinct = len(set(filter(None, prompts.texts.tags["train"].ravel())))
    assert parts == sum(min(n, distinct) for n in description._TAGS)
    assert 0.8 < amid / (description._CHATTER * len(found)) < 1.2


def test_without_tags_the_items_own_descriptions_are_quoted():
    found = description.examples(bank(about="Heat: action, crime"), np.random.default_rng(0))
    assert {example.text[example.start : example.end] for example in found} >= {"heat: action, crime"}


@settings(deadline=None)  # torch is slow to wake
@given(st.lists(st.floats(-5, 5).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=12))
def test_the_best_stretch_is_the_best_of_all(odds):
    odds = np.array(odds)
    stretches = [(i, j) for i in range(len(odds)) for j in range(i, len(odds))]
    best = max(odds[i : j + 1].sum() for i, j in stretches)
    found = description._best_stretch(odds)
    if (odds <= 0).all():
        assert found is None
    else:
        assert odds[found[0] : found[1] + 1].sum() == pytest.approx(best)


def test_sentences_never_seen_lose_what_is_around_the_description(encoder, tagger):
    texts = [form.format(text) for form, text in SENTENCES.items()]
    read = description.read(tagger, encoder, texts)
    assert all(found in text for found, text in zip(read, texts))
    around = [len(text) - len(found) for found, text in zip(read, texts)]
    assert sum(around) > 0.5 * sum(len(form.format("")) for form in SENTENCES)
    raw, asked, meant = (encoder.encode(part) for part in (texts, read, list(SENTENCES.values())))
    assert (asked * meant).sum() > (raw * meant).sum() + 0.2


def test_a_text_that_is_no_sentence_around_anything_stands_as_it_is(encoder, tagger):
    texts = ["", " ", "🎬🎬", "two estranged brothers row across the Atlantic", "  spaces around  "]
    read = description.read(tagger, encoder, texts)
    assert read[3] == texts[3]
    assert all(isinstance(text, str) for text in read) and read[:2] == ["", ""]


def test_the_second_reading_comes_from_the_cache(encoder, tagger, monkeypatch):
    texts = [form.format(text) for form, text in SENTENCES.items()]
    first = description.read(tagger, encoder, texts)
    again = description.fitted(encoder, few_examples(), 0)
    monkeypatch.setattr(encoder, "encode_tokens", None)  # a second pass would fail
    assert description.read(again, encoder, texts) == first
    for name, weights in tagger.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weights, atol=0, rtol=0)


def test_requests_leave_nothing_on_the_disk(encoder, tagger):
    text = "please show me something with a private secret of mine"
    description.read(tagger, encoder, [text], cached=False)
    assert not any(text.encode() in path.read_bytes() for path in encoder.cache.folder.iterdir())


def test_an_encoder_that_does_not_tell_where_its_tokens_stand(encoder, monkeypatch):
    def slow(*_, **__):
        raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers")

    monkeypatch.setattr(type(encoder._model), "tokenizer", property(lambda _: slow))
    with pytest.raises(UserError, match="read_prompts=False"):
        encoder.token_places(["a comedy"])


def test_a_bank_embeds_what_is_read_beside_the_text(encoder):
    prompts = bank(3)
    row = prompts.row("I would love a comedy tonight")
    prompts.embed(encoder, read=lambda texts: ["Comedy" if "love a comedy" in text else text for text in texts])
    assert prompts.descriptions[row] == "Comedy"
    torch.testing.assert_close(prompts.asked[row], torch.from_numpy(encoder.encode(["Comedy"])[0]))
    torch.testing.assert_close(prompts.vectors[row], torch.from_numpy(encoder.encode(["I would love a comedy tonight"])[0]).half())
    phrases = prompts.phrase[prompts.phrase != NO_PROMPT]
    torch.testing.assert_close(prompts.asked[phrases].half(), prompts.vectors[phrases])
