"""The prompt corpora: complete, well formed, and what trains kept apart from what evaluates."""

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.sparse import csr_matrix

ROOT = Path(__file__).parent.parent
CORPORA = ROOT / "dataset" / "prompts"
COLUMNS = {
    "intents_train": ["text", "clauses", "style", "domain"],
    "intents_heldout": ["text", "clauses", "style", "domain"],
    "intents_heldout2": ["text", "clauses", "style", "domain"],
    "intents_heldout3": ["text", "clauses", "style", "domain"],
    "intents_heldout4": ["text", "clauses", "style", "domain"],
    "intents_heldout5": ["text", "clauses", "style", "domain"],
    "intents_heldout6": ["text", "clauses", "style", "domain"],
    "intents_heldout7": ["text", "clauses", "style", "domain"],
    "requests": ["text", "clauses", "style", "categories"],
    "meanings": ["text", "categories"],
    "category_wishes": ["text", "intent", "categories"],
    "category_wishes_dev": ["text", "intent", "categories"],
    "neutral_heldout": ["text", "intent"],
}
MIN_ROWS = {
    **{"intents_train": 21200, "intents_heldout": 400, "intents_heldout2": 400, "intents_heldout3": 400, "intents_heldout4": 360, "intents_heldout5": 390, "intents_heldout6": 340, "intents_heldout7": 380},
    **{"requests": 5280, "meanings": 11400, "category_wishes": 300, "category_wishes_dev": 350, "neutral_heldout": 100},
}
MIN_HELD_OUT_COMPOUNDS = 150
INTENTS = {"positive", "negative"}
DOMAINS = {"films", "news", "products", "music", "books", "restaurants", "games", "travel"}
CATEGORIES = set(
    "Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western".split()
)
MAX_JACCARD_HELD_OUT = 0.4
MAX_JACCARD_WISHES = 0.5
MAX_JACCARD_TEMPLATES = 0.5

HELD_OUT = ("intents_heldout", "intents_heldout2", "intents_heldout3", "intents_heldout4", "intents_heldout5", "intents_heldout6", "intents_heldout7")
TRAINING = ("intents_train", "requests")
CLAUSED = (*TRAINING, *HELD_OUT)
each_file = pytest.mark.parametrize("name", COLUMNS)
each_held_out = pytest.mark.parametrize("name", HELD_OUT)
each_claused = pytest.mark.parametrize("name", CLAUSED)


def path(name):
    return (ROOT / "dataset" / "movielens" if name in ("requests", "meanings") else CORPORA) / f"{name}.tsv"


def read(name):
    with open(path(name), encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))


ROWS = {name: read(name) for name in COLUMNS}
FRAMES = (CORPORA / "intent_frames.txt").read_text(encoding="utf-8").splitlines()
TEXTS = {name: [row["text"] for row in rows] for name, rows in ROWS.items()}


def clauses(row):
    """[(clause, intent), …] of a row."""
    return [tuple(part.split("||")) for part in row["clauses"].split(" ## ")]


def words(text):
    return set(re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower()))


def normalise(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def most_shared(texts, others):
    """For each text: the largest Jaccard overlap and the largest share of its words with one of the others."""
    vocabulary = {}
    sets = [[{vocabulary.setdefault(w, len(vocabulary)) for w in words(t)} for t in part] for part in (texts, others)]
    a, b = (
        csr_matrix((np.ones(sum(map(len, part))), ([i for i, s in enumerate(part) for _ in s], [w for s in part for w in s])), (len(part), len(vocabulary)))
        for part in sets
    )
    shared = (a @ b.T).tocoo()
    size_a, size_b = np.asarray(a.sum(1)).ravel(), np.asarray(b.sum(1)).ravel()
    jaccard, share = np.zeros(len(texts)), np.zeros(len(texts))
    np.maximum.at(jaccard, shared.row, shared.data / (size_a[shared.row] + size_b[shared.col] - shared.data))
    np.maximum.at(share, shared.row, shared.data / size_a[shared.row])
    return jaccard, share


def too_close(texts, others, bound):
    jaccard, _ = most_shared(texts, others)
    return [(round(float(j), 2), t) for j, t in zip(jaccard, texts) if j > bound]


def templates(parts):
    """Sentences of the template pools and the frames, placeholders left out."""
    found = []
    for path in sorted((ROOT / "properties" / "prompts").glob("*.yaml")):
        pools = yaml.safe_load(path.read_text(encoding="utf-8"))
        for pool in pools.values():
            if not isinstance(pool, (dict, list)):
                continue  # the word for an item
            if isinstance(pool, dict):  # templates: pairs of a category form and a tag form
                found += [text for part in parts for forms in pool[part] for text in forms.values()]
            elif "train" in parts:  # frames and small talk: they only train
                found += pool
    return [re.sub(r"\{\w+\}", " ", text) for text in found]


@each_file
def test_counts_and_columns(name):
    header = path(name).read_text(encoding="utf-8").split("\n", 1)[0]
    assert header.split("\t") == COLUMNS[name]
    assert len(ROWS[name]) >= MIN_ROWS[name]
    for row in ROWS[name]:
        assert None not in row and all(row.values()), row
        for cell in row.values():
            assert cell == " ".join(cell.split()), row


def test_no_text_twice():
    """Over all files, case and punctuation aside."""
    counts = Counter(normalise(t) for texts in TEXTS.values() for t in texts)
    assert [t for t, n in counts.items() if n > 1] == []


@each_claused
def test_clauses_are_found_in_order(name):
    for row in ROWS[name]:
        at = 0
        for clause, intent in clauses(row):
            assert intent in INTENTS and re.search(r"\w", clause), row
            assert clause == clause.strip(" ,;.!?"), row
            at = row["text"].find(clause, at)
            assert at >= 0, row
            at += len(clause)
            # whole words: "war" is not a clause of "warm"
            assert not re.match(r"\w", row["text"][at:]) and not re.search(r"\w$", row["text"][: at - len(clause)]), row


@each_claused
def test_intents_styles_and_domains_are_spread(name):
    rows = ROWS[name]
    intents = Counter(intent for row in rows for _, intent in clauses(row))
    assert min(intents.values()) >= (0.39 if name == "requests" else 0.4) * intents.total()  # requests are there for their refusals
    styles = Counter(row["style"] for row in rows)
    assert min(styles.values()) >= {"intents_heldout4": 20, "intents_heldout5": 20, "intents_heldout6": 19, "intents_heldout7": 23}.get(name, 25)  # of which texts near to training have left
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)?", style) for style in styles)
    if name == "requests":
        return
    domains = Counter(row["domain"] for row in rows)
    assert set(domains) == DOMAINS
    assert min(domains.values()) >= 0.05 * len(rows)
    assert max(domains.values()) <= 0.55 * len(rows)


def test_clauses_of_requests_have_categories():
    """One cell for each clause; `-` where none is meant."""
    meant = Counter()
    for row in ROWS["requests"]:
        cells = row["categories"].split(" ## ")
        assert len(cells) == len(clauses(row)), row
        for cell, (_, intent) in zip(cells, clauses(row)):
            assert cell == "-" or set(cell.split("|")) <= CATEGORIES, row
            meant.update((intent, category) for category in cell.split("|"))
    assert min(meant[intent, category] for intent in INTENTS for category in CATEGORIES) >= 50


def test_meanings_are_categories():
    meant = Counter(category for row in ROWS["meanings"] for category in row["categories"].split("|"))
    assert set(meant) == CATEGORIES | {"-"} and min(meant.values()) >= 50
    assert meant["-"] >= 2900  # of none: names, length, craft, small talk


def test_styles_of_training_and_heldout_are_disjoint():
    train, *held_out = ({row["style"] for row in ROWS[name]} for name in CLAUSED)
    assert len(set.union(train, *held_out)) == sum(map(len, (train, *held_out)))


@each_held_out
def test_held_out_compounds(name):
    assert sum(len(clauses(row)) > 1 for row in ROWS[name]) >= MIN_HELD_OUT_COMPOUNDS


@each_held_out
def test_heldout_shares_at_most_half_its_words_with_a_training_text(name):
    jaccard, share = most_shared(_long_enough(name), [text for part in TRAINING for text in TEXTS[part]])
    assert jaccard.max() <= MAX_JACCARD_HELD_OUT
    assert share.max() <= 0.5 or name in HELD_OUT[4:]  # "I want something with" and the like count in that share


def _long_enough(name):
    """Of the later files, the third of which has minimalists, texts of more than four words: "no zombies" cannot help sharing half of them."""
    if name not in ("intents_heldout3", "intents_heldout4"):  # later ones are held to the overlap alone, for all of their texts
        return TEXTS[name]
    long = [text for text in TEXTS[name] if len(words(text)) > 4]
    assert len(TEXTS[name]) - len(long) <= 32
    return long


def test_frames():
    """Slots alone in braces, of both intents alike, and none twice."""
    assert len(FRAMES) >= 1800 and len(set(FRAMES)) == len(FRAMES)
    slots = [re.findall(r"\{[^}]*\}", frame) for frame in FRAMES]
    assert all(slots) and {slot for own in slots for slot in own} == {"{+}", "{-}", "{+s}", "{-s}"}
    wanted = [sum("+" in slot for slot in own) / len(own) for own in slots]
    assert 0.4 <= np.mean(wanted) <= 0.6


@pytest.mark.parametrize(
    ("name", "bound"), [*((name, MAX_JACCARD_HELD_OUT) for name in HELD_OUT), ("category_wishes", MAX_JACCARD_WISHES)]
)
def test_frames_are_apart_from_what_evaluates(name, bound):
    bare = [re.sub(r"\{[^}]*\}", " ", frame) for frame in FRAMES]
    jaccard, share = most_shared(_long_enough(name), bare)
    assert jaccard.max() <= bound
    assert share.max() <= 0.5 or name not in HELD_OUT[:4]
    assert too_close(bare, templates(["eval"]), MAX_JACCARD_TEMPLATES) == []


def test_category_wishes():
    rows = ROWS["category_wishes"]
    intents = Counter(row["intent"] for row in rows)
    assert set(intents) == INTENTS
    assert 0.5 <= intents["positive"] / len(rows) <= 0.7
    for intent, at_least in (("positive", 10), ("negative", 5)):
        named = Counter(c for row in rows if row["intent"] == intent for c in row["categories"].split("|"))
        assert set(named) == CATEGORIES
        assert min(named.values()) >= at_least
    for row in rows:
        categories = row["categories"].split("|")
        assert len(categories) == len(set(categories)), row


def test_category_wishes_are_apart_from_training_texts():
    film_texts = []
    for name in ("tags", "wishes"):
        with open(ROOT / "dataset" / "movielens" / f"{name}.tsv", encoding="utf-8", newline="") as f:
            for row in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE):
                film_texts += [text for column, text in row.items() if column not in ("ml1m_id", "ml100k_id", "title") and text]
    wishes = TEXTS["category_wishes"]
    for chosen_on_or_measured in (wishes, TEXTS["category_wishes_dev"]):
        assert too_close(chosen_on_or_measured, TEXTS["requests"] + TEXTS["meanings"], MAX_JACCARD_WISHES) == []
    assert too_close(wishes, TEXTS["intents_train"] + templates(["train", "eval"]), MAX_JACCARD_WISHES) == []
    assert too_close(wishes, film_texts, MAX_JACCARD_WISHES) == []
    assert too_close(wishes, [text for name in HELD_OUT for text in TEXTS[name]], MAX_JACCARD_WISHES) == []


def test_requests_that_mean_no_genre_are_apart_from_training_texts():
    texts, rows = TEXTS["neutral_heldout"], ROWS["neutral_heldout"]
    assert {row["intent"] for row in rows} == INTENTS
    assert too_close(texts, TEXTS["requests"] + TEXTS["meanings"] + TEXTS["intents_train"], MAX_JACCARD_WISHES) == []
    assert not any(set(words(text)) & {category.lower() for category in CATEGORIES} for text in texts)


def test_wishes_that_choose_are_apart_from_those_that_evaluate():
    """Two sets of one kind: the one is looked at, the other is not."""
    dev, rows = TEXTS["category_wishes_dev"], ROWS["category_wishes_dev"]
    for intent in INTENTS:
        assert {c for row in rows if row["intent"] == intent for c in row["categories"].split("|")} == CATEGORIES
    assert too_close(dev, TEXTS["category_wishes"], 0.4) == []
    assert too_close(dev, TEXTS["intents_heldout"], MAX_JACCARD_HELD_OUT) == []


def test_training_repeats_no_evaluation_template():
    held_out = templates(["eval"])
    assert len(held_out) == 160
    for name in (*TRAINING, "meanings"):
        assert too_close(TEXTS[name], held_out, MAX_JACCARD_TEMPLATES) == []
