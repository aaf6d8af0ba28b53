"""Tags, wishes, templates and the encoder: parts never mix, texts find their items, the cache tells the truth."""

import csv
import re
import sqlite3
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from recbole_dpr.data.dataset import TEST, VALID
from recbole_dpr.errors import UserError
from recbole_dpr.evaluation.queries import QuerySet, prompts_for
from recbole_dpr.prompts import tags
from recbole_dpr.prompts.bank import NO_PROMPT, PromptBank, PromptTable
from recbole_dpr.prompts.encoder import PromptEncoder
from recbole_dpr.prompts.tags import load_item_texts, title_key
from recbole_dpr.prompts.templates import NEGATIVE, POSITIVE, Templates
from recbole_dpr.resources import dataset_dir

MOVIELENS = dataset_dir() / "movielens"
IDS = np.array(["[PAD]", "1", "2", "3", "none-of-ours"])
NO_TITLES = np.full(5, "", dtype=object)


def movielens_texts():
    """Without the texts of known meaning, which take a minute to embed."""
    return replace(load_item_texts("movielens", IDS, NO_TITLES, NO_TITLES, "ml1m_id"), meanings=[])


def bank():
    rng = np.random.default_rng(0)
    return PromptBank(Templates("film"), movielens_texts(), ("Comedy", "Sci-Fi", "Action"), NO_TITLES, rng)


def words(*phrases):
    return set(re.findall(r"[a-z]{4,}", " ".join(phrases).lower()))


def test_texts_find_their_items():
    texts = movielens_texts()
    assert texts.tags["train"][1, 0] == "Cowboy doll resents a flashy spaceman newcomer"
    assert texts.tags["eval"][1, 0] == "Pull-string sheriff envies a shiny astronaut rival"
    assert (texts.tags["train"][[0, 4]] == "").all()
    assert texts.coverage() == 0.75


def test_titles_match_across_spellings():
    assert title_key("City of Lost Children, The (1995)") == title_key("The City of Lost Children", "1995")
    assert title_key("Misérables, Les (1995)") == title_key("Miserables Les", "1995")
    assert title_key("Sabrina (1954)") != title_key("Sabrina", "1995")


def test_evaluation_phrases_share_no_long_word_with_training():
    """On the file itself: what the README of the data says, by whole words of four letters on."""
    with open(MOVIELENS / "tags.tsv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    train, evaluation = tags.TAG_COLUMNS["train"], tags.TAG_COLUMNS["eval"]
    common = {"with", "that", "from", "into", "this", "their", "they", "over", "whose", "through", "about", "than", "when", "while", "your", "some", "what"}
    shared = [row["title"] for row in rows if (words(*(row[c] for c in train)) & words(*(row[c] for c in evaluation))) - common]
    assert len(rows) == 3916
    assert len(shared) <= 0.01 * len(rows)


def test_columns_of_the_parts_are_disjoint():
    for columns in (tags.TAG_COLUMNS, tags.WISH_COLUMNS):
        names = [name for part in columns.values() for name in part]
        assert len(names) == len(set(names))


def test_no_training_prompt_is_an_evaluation_prompt():
    """By text, over everything that a bank and the test queries hold."""
    prompts = bank()
    n_train = len(prompts.all_texts)
    rng = np.random.default_rng(1)
    size = 400
    queries = QuerySet(
        *("POS", 3, np.zeros(size, int), np.zeros((size, 1), int)),
        *(rng.integers(0, 3, size), rng.integers(1, 4, size), rng.random((size, 2))),
    )
    negative = QuerySet("NEG", 3, *(getattr(queries, f) for f in ("position", "targets", "category", "spoken_of", "draws")))
    for part, kinds in ((TEST, ("category", "tag", "wish")), (VALID, ("category", "wish"))):
        for kind in kinds:
            rows, own = prompts_for(prompts, queries, kind, part)
            assert (rows >= n_train).all()
            assert (own == NO_PROMPT).all()
    for kind in ("category", "tag"):
        assert (prompts_for(prompts, negative, kind, TEST)[0] >= n_train).all()


def test_validation_by_tag_names_the_phrase_that_it_repeats():
    prompts = bank()
    queries = QuerySet("POS", 3, np.zeros(1, int), np.zeros((1, 1), int), np.array([0]), np.array([1]), np.array([[0.5, 0.5]]))
    rows, own = prompts_for(prompts, queries, "tag", VALID)
    assert prompts.all_texts[own[0]] == movielens_texts().tags["train"][1, 1]
    assert prompts.all_texts[own[0]][1:] in prompts.all_texts[rows[0]]


def test_templates_fill_in():
    templates = Templates("film")
    assert templates.category(POSITIVE, "eval", _index(templates, POSITIVE, "What should I see?"), "Action").startswith("I feel like watching an action film")
    assert "{" not in "".join(
        templates.category(i, p, k, "Drama") + templates.tag(i, p, k, "A tag.") for i in (0, 1) for p in ("train", "valid", "eval") for k in range(18)
    )


def _index(templates, intent, text):
    return next(k for k in range(templates.size("category", intent, "eval")) if text in templates.category(intent, "eval", k, "x"))


def test_pools_partition():
    templates = Templates("neutral")
    for intent in (POSITIVE, NEGATIVE):
        sizes = {kind: [templates.size(kind, intent, part) for part in ("train", "valid", "eval")] for kind in ("category", "tag")}
        held_out = {"category": (29, 19)[intent], "tag": (20, 14)[intent]}  # every sixth of the frames
        frames = {"category": (170, 114)[intent], "tag": (120, 80)[intent]}
        assert sizes == {kind: [16 + frames[kind] - held_out[kind], 4 + held_out[kind], 20] for kind in sizes}


@pytest.mark.parametrize("name", ["no-such-pool", "/no/such/file.yaml"])
def test_unknown_templates(name):
    with pytest.raises(UserError, match="film"):
        Templates(name)


@pytest.mark.parametrize(
    ("name", "column", "said"),
    [("no-such-folder", "item_id", "movielens"), ("movielens", "no_column", "no_column"), ("movielens", "title", "none of its rows")],
)
def test_wrong_texts(name, column, said):
    with pytest.raises(UserError, match=said):
        load_item_texts(name, IDS, NO_TITLES, NO_TITLES, column)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return PromptEncoder(cache_dir=tmp_path_factory.mktemp("cache"), precision="float32")


def test_encoder_knows_meaning(encoder):
    comedy, funny, war = encoder.encode(["a comedy", "something funny to laugh at", "tanks in the desert war"])
    assert comedy @ funny > comedy @ war + 0.1
    assert np.linalg.norm(comedy) == pytest.approx(1, abs=1e-5)


def test_cache_returns_what_was_encoded(encoder, monkeypatch):
    texts = ["a", "b", "a", "🎬", "ein Film auf Deutsch"]
    first = encoder.encode(texts)
    np.testing.assert_array_equal(first[0], first[2])
    monkeypatch.setattr(encoder, "_encode_chunk", None)  # a second encoding would fail
    np.testing.assert_array_equal(encoder.encode(texts), first)


def test_cache_is_per_encoder_and_precision(encoder, tmp_path):
    other = PromptEncoder(cache_dir=encoder.cache.path.parent, precision="bfloat16")
    assert other.cache.path != encoder.cache.path
    near = torch.cosine_similarity(torch.tensor(other.encode(["a comedy"])), torch.tensor(encoder.encode(["a comedy"])))
    assert 0.999 < float(near)


def test_interrupted_encoding_keeps_whole_rows(encoder, monkeypatch):
    monkeypatch.setattr("recbole_dpr.prompts.encoder._CHUNK", 2)
    real, calls = encoder._encode_chunk, []

    def fails_later(texts, bar):
        calls.append(texts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(texts, bar)

    monkeypatch.setattr(encoder, "_encode_chunk", fails_later)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(["one", "two", "three", "four"])
    kept = sqlite3.connect(encoder.cache.path).execute("SELECT count(*) FROM vectors WHERE text IN ('one', 'two', 'three', 'four')")
    assert kept.fetchone()[0] == 2


def test_missing_encoder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no/such-encoder") as error:
        PromptEncoder("no/such-encoder", cache_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_unwritable_cache_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="prompt_cache_dir"):
        PromptEncoder(cache_dir=Path(tmp_path / "file"))


def test_token_vectors(encoder):
    flat, offsets = encoder.encode_tokens(["a comedy", "a much longer prompt with many words"])
    assert offsets[0] == 0 and offsets[-1] == len(flat) and flat.shape[1] == encoder.dim
    assert np.diff(offsets)[1] > np.diff(offsets)[0] > 1


def test_what_an_item_is_about_is_a_row_of_its_own():
    about = ["", "Toy Story: animation, comedy", "Jumanji", "", "Sabrina: romance"]
    prompts = PromptBank(Templates("film"), movielens_texts(), ("Comedy",), about, np.random.default_rng(0))
    assert [prompts.all_texts[row] if row != NO_PROMPT else "" for row in prompts.about] == about
    assert not set(prompts.about) - {NO_PROMPT} & set(prompts.phrase.ravel())


@pytest.mark.parametrize("intent", [POSITIVE, NEGATIVE])
def test_the_category_reader_tells_what_is_named(encoder, intent):
    """Real sentences that training never saw: the category named is mostly the likeliest, and most wishes name none."""
    ids = np.array(["[PAD]", *map(str, range(1, 21))])
    blank = np.full(len(ids), "", dtype=object)
    texts = replace(load_item_texts("movielens", ids, blank, blank, "ml1m_id"), meanings=[])
    prompts = PromptBank(Templates("film"), texts, ("Comedy", "Sci-Fi", "Action"), blank, np.random.default_rng(0))
    size = prompts.templates.size("category", intent, "valid")
    named = [prompts.category_rows(intent, "valid", np.full(size, c), np.arange(size)) for c in range(3)]
    wishes = prompts.rows(prompts.texts.wishes["valid"][1:, 0])
    prompts.embed(encoder)
    weight, bias = prompts.category_reader(intent)
    read = lambda rows: (prompts.vectors[rows].float() @ weight + bias).softmax(1)  # noqa: E731
    for category, rows in enumerate(named):
        assert (read(rows).argmax(1) == category).float().mean() > 0.95
    if intent == POSITIVE:
        assert (read(wishes).argmax(1) == 3).float().mean() > 0.9


def test_a_category_reader_without_phrases_or_with_one_category(encoder):
    """What there is no example of gets no probability."""
    texts = load_item_texts(None, IDS, NO_TITLES, NO_TITLES, "item_id")
    for names in (("Comedy",), ("Comedy", "Western")):
        prompts = PromptBank(Templates("film"), texts, names, NO_TITLES, np.random.default_rng(0))
        prompts.embed(encoder)
        weight, bias = prompts.category_reader(POSITIVE)
        found = (prompts.vectors[prompts.category[POSITIVE]].float() @ weight + bias).softmax(-1)
        assert (found[..., -1] == 0).all()
        assert (found.argmax(-1) == torch.arange(len(names))[:, None]).all()


def test_texts_of_known_meaning(tmp_path):
    """Texts alone; and of requests their clauses, and the whole where all of it has one intent; categories that a dataset lacks are nobody's."""
    header = "\t".join(["item_id", "title", *(c for part in tags.TAG_COLUMNS.values() for c in part)])
    (tmp_path / "tags.tsv").write_text(f"{header}\n1\tA\ta\tb\tc\td\te\tf\n")
    requests = "text\tclauses\tcategories\nno guns, no ghosts\tguns||negative ## ghosts||negative\tAction|Western ## Horror\na barn, but no kissing\ta barn||positive ## kissing||negative\t- ## Romance\n"
    (tmp_path / "requests.tsv").write_text(requests)
    (tmp_path / "meanings.tsv").write_text("text\tcategories\na saloon\tWestern\n\tHorror\nwhatever\t\n")
    texts = load_item_texts(tmp_path, np.array(["[PAD]", "1"]), np.array(["", "A"], dtype=object), np.array(["", ""], dtype=object), "item_id")
    assert texts.meanings == [
        ("a saloon", {"Western"}),
        ("whatever", set()),
        ("guns", {"Action", "Western"}),
        ("ghosts", {"Horror"}),
        ("no guns, no ghosts", {"Action", "Western", "Horror"}),
        ("a barn", set()),
        ("kissing", {"Romance"}),
    ]
    prompts = PromptBank(Templates("film"), texts, ("Western", "Horror"), np.array(["", "A"], dtype=object), np.random.default_rng(0))
    assert [prompts.all_texts[row] for row in prompts.meaning] == [text for text, _ in texts.meanings]
    np.testing.assert_array_equal(prompts.meant, np.array([[1, 0], [0, 0], [1, 0], [0, 1], [1, 1], [0, 0], [0, 0]], dtype=bool))
    (tmp_path / "requests.tsv").write_text(requests + "x\tx||positive\tWar ## Horror\n")
    with pytest.raises(UserError, match="line 4: 1 clauses and 2 cells"):
        load_item_texts(tmp_path, np.array(["[PAD]", "1"]), np.array(["", "A"], dtype=object), np.array(["", ""], dtype=object), "item_id")
