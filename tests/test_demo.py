"""The demo page: what its controls do, that nothing is injected, and the page as gradio serves it (where it is installed)."""

import re
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from html import escape

import pytest

from recbole_dpr import load
from recbole_dpr.cli import main
from recbole_dpr.errors import UserError
from recbole_dpr.prompts.intent import Clause
from recbole_dpr.serving import demo
from recbole_dpr.serving.demo import Conversation, Page

HOSTILE = "<script>alert(1)</script>\"' onmouseover=x & ${1+1}"
WATCHED = ["i3", "i14"]


@pytest.fixture
def rec(tiny_model):
    return load(tiny_model)


def lists_of(html):
    """The titles of every list on the page."""
    return [re.findall('class="title">([^<]*)<', section) for section in html.split("<section>")[1:]]


def test_a_prompt_steers_the_second_list(rec):
    page = Page(rec)
    start, before = page.show(Conversation(), "", WATCHED, 1.0)
    after, html = page.say("a western, but no horror", start, "", WATCHED, 1.0)
    assert [(wish.text, wish.intent) for wish in after.wishes] == [("a western", "positive"), ("horror", "negative")]
    plain, asked = lists_of(html)
    assert lists_of(before) == [plain, []]
    assert plain == rec.recommend(WATCHED).titles
    assert asked == rec.recommend(WATCHED, "a western, but no horror").titles != plain
    assert "▲" in html and "You said" in html


def test_a_follow_up_adds_to_the_wishes(rec):
    page = Page(rec)
    first, _ = page.say("a western", Conversation(), "", WATCHED, 1.0)
    second, html = page.say("no horror", first, "", WATCHED, 1.0)
    assert second.said == ("a western", "no horror")
    assert lists_of(html)[1] == rec.recommend(WATCHED, "a western, but no horror").titles
    third, _ = page.say("no Horror", second, "", WATCHED, 1.0)
    assert [wish.text for wish in third.wishes] == ["a western", "Horror"]  # said twice, wished once


def test_a_flipped_chip_answers_as_the_other_intent(rec):
    page = Page(rec)
    said, _ = page.say("a western, but no horror", Conversation(), "", WATCHED, 1.0)
    flipped, html = page.flip(["1"], said, "", WATCHED, 1.0)
    assert [wish.intent for wish in flipped.wishes] == ["negative", "positive"]
    assert lists_of(html)[1] == rec.recommend(WATCHED, [Clause("a western", "negative"), Clause("horror", "positive")]).titles


def test_strength_user_and_history(rec):
    page = Page(rec)
    said, _ = page.say("a western", Conversation(), "", WATCHED, 1.0)
    plain, asked = lists_of(page.show(said, "", WATCHED, 0)[1])
    assert plain == asked
    known = lists_of(page.show(said, "u7", WATCHED, 1.0)[1])[0]  # a known user who has watched more
    assert known == rec.recommend([*rec.history("u7"), *WATCHED]).titles


@pytest.mark.parametrize("user", ["nobody", HOSTILE, "u" * 10_000])
def test_an_unknown_user_is_one_clear_line(rec, user):
    _, html = Page(rec).show(Conversation(), user, [], 1.0)
    assert "unknown user" in html and html.count("<p") == 1
    assert "<script" not in html


@pytest.mark.parametrize("prompt", ["", "  ", "🎬", "فيلم بلا رعب", HOSTILE, "x" * 10_000])
def test_odd_prompts(rec, prompt):
    conversation, html = Page(rec).say(prompt, Conversation(), "", WATCHED, 1.0)
    assert len(lists_of(html)[0]) == 10
    assert "<script" not in html
    assert bool(conversation.said) == bool(prompt.strip() and len(prompt) <= 1000)
    if len(prompt) > 1000:
        assert "10,000 characters" in html


def test_titles_and_categories_are_escaped(rec):
    rec.titles = [HOSTILE] * len(rec.titles)
    rec.categories = [[HOSTILE]] * len(rec.categories)
    _, html = Page(rec).say("a western", Conversation(), "", WATCHED, 1.0)
    assert "<script" not in html and html.count(escape(HOSTILE)) == 40


def test_50_visitors_at_once(rec):
    page = Page(rec)
    prompts = [f"a western of kind {n}, but no horror of kind {n}" for n in range(50)]
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda prompt: page.say(prompt, Conversation(), "u7", [], 1.0), prompts))
    for prompt, (conversation, html) in zip(prompts, answers):
        assert conversation.said == (prompt,)
        assert lists_of(html)[1] == rec.recommend(user="u7", prompt=prompt).titles


def test_example_prompts_are_of_the_data(rec):
    names = [name.lower() for name in rec.category_names]
    assert all(any(name in prompt for name in names) for prompt in Page(rec).example_prompts())


# --- as gradio serves it


def test_without_gradio(rec, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="pip install"):
        demo.launch(rec)


@pytest.mark.parametrize(("argument", "said"), [("--port=http", "--port=http"), ("--port=99999", "65535"), ("--prt=1", "--port")])
def test_wrong_arguments(tiny_model, capsys, argument, said):
    assert main(["demo", str(tiny_model), argument]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def served(rec):
    pytest.importorskip("gradio")
    blocks, address = demo.launch(rec, port=free_port(), block=False)
    yield address
    blocks.close()


def test_the_page_loads_nothing_from_elsewhere(served):
    import httpx

    answer = httpx.get(served)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "fonts.googleapis" not in answer.text and "cdnjs" not in answer.text


def test_a_port_in_use_is_one_clear_line(rec, served):
    with pytest.raises(UserError, match="--port="):
        demo.launch(rec, port=int(served.rstrip("/").rpartition(":")[2]), block=False)
