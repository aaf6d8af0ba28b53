"""The prompt template pools: complete, well formed, train and eval disjoint, intent plain."""

import re
from itertools import combinations, product
from pathlib import Path

import pytest
import yaml

PROMPTS = Path(__file__).parent.parent / "properties" / "prompts"
FILES = {"film": "film", "neutral": "item"}  # file -> its noun
INTENTS = ("positive", "negative")
SPLITS = ("train", "eval")
FORMS = ("category", "tag")
POOL_SIZE = 20
MAX_JACCARD = 0.6
MIN_WORDS, MAX_WORDS = 4, 20  # a placeholder counts as one word

PLACEHOLDER = re.compile(r"\{[^{}]*\}")
FILM_WORDS = re.compile(
    r"\b(films?|movies?|cinema|flicks?|watch(ing)?|screen|tonight|popcorn|stream|plots?)\b"
)

# Words and phrases that tell of an intent to avoid something.
NEGATION_CUE = re.compile(
    r"\b("
    r"no|not|nor|never|none|nobody|nothing|neither|nah|without|cannot|\w+n't|dont|cant|wont|"
    r"avoid\w*|skip\w*|except\w*|exclud\w*|omit\w*|block\w*|hide|filter\w*|remov\w*|refuse\w*|"
    r"less|fewer|but|besides|rather|instead|unless|apart from|anymore|no longer|"
    r"dislik\w*|hat(e|es|ed|ing)|loath\w*|detest\w*|annoy\w*|ruin\w*|bor(ed|es|ing)|"
    r"tired|sick|fed up|enough|too (much|many)|had my fill|stop\w*|quit|spare|"
    r"leave (\S+ ){0,4}out|leaves? me cold|(keep|kept) (\S+ ){1,3}(away|off)|"
    r"(stay|steer|far|look|move) (\S+ )?(clear|away|elsewhere)|pass on|hold(ing)? (\S+ )?back|"
    r"cross (\S+ )?off|off the table|gone off|rule (\S+ )?out|last thing|lost all interest|"
    r"break from|unwelcome|different|else"
    r")\b"
)


def load(name):
    return yaml.safe_load((PROMPTS / f"{name}.yaml").read_text(encoding="utf-8"))


POOLS = {name: load(name) for name in FILES}


def placeholders(template):
    return PLACEHOLDER.findall(template)


def words(template):
    """The words of a template, lower case, punctuation and placeholder removed."""
    bare = PLACEHOLDER.sub(" ", template.lower()).replace("'", "")
    return re.findall(r"[a-z0-9]+", bare)


def normalise(template):
    return " ".join(words(template))


def jaccard(a, b):
    a, b = set(words(a)), set(words(b))
    return len(a & b) / len(a | b)


def templates(name, intent, split):
    return [entry[form] for entry in POOLS[name][intent][split] for form in FORMS]


def prose(template):
    return " ".join(PLACEHOLDER.sub(" X ", template.lower()).replace('"', " ").split())


each_pool = pytest.mark.parametrize(
    ("name", "intent", "split"), list(product(FILES, INTENTS, SPLITS))
)
each_file = pytest.mark.parametrize("name", list(FILES))


@each_file
def test_layout(name):
    pools = POOLS[name]
    assert set(pools) == {"noun", *INTENTS}
    assert pools["noun"] == FILES[name]
    for intent in INTENTS:
        assert set(pools[intent]) == set(SPLITS)


@each_pool
def test_pool_is_complete(name, intent, split):
    pool = POOLS[name][intent][split]
    assert len(pool) == POOL_SIZE
    for entry in pool:
        assert set(entry) == set(FORMS)
        for form in FORMS:
            assert isinstance(entry[form], str) and entry[form] == entry[form].strip()


@each_pool
def test_placeholders(name, intent, split):
    for entry in POOLS[name][intent][split]:
        found = placeholders(entry["category"])
        assert found in (["{category}"], ["{a_category}"]), entry["category"]
        assert placeholders(entry["tag"]) == ["{tag}"], entry["tag"]
        for form in FORMS:  # nothing but the placeholders in braces, and they fill in
            filled = entry[form].format(category="action", a_category="an action", tag="lost dog")
            assert not set("{}") & set(filled)


@each_pool
def test_article_belongs_to_the_placeholder(name, intent, split):
    for entry in POOLS[name][intent][split]:
        assert not re.search(r"\ban? \{a_category\}", entry["category"].lower())
        assert not re.search(r"\ban? \{category\}", entry["category"].lower()), entry["category"]


@each_pool
def test_length(name, intent, split):
    for template in templates(name, intent, split):
        assert MIN_WORDS <= len(PLACEHOLDER.sub("X", template).split()) <= MAX_WORDS, template


@each_file
def test_no_template_twice(name):
    """Over both intents, both splits and both forms; the two forms of one entry may agree."""
    seen = set()
    for intent, split in product(INTENTS, SPLITS):
        for entry in POOLS[name][intent][split]:
            keys = {normalise(entry[form]) for form in FORMS}
            assert not keys & seen, entry
            seen |= keys


@pytest.mark.parametrize(("train_file", "eval_file"), list(product(FILES, FILES)))
def test_train_and_eval_are_disjoint(train_file, eval_file):
    """Over intents, forms and files: mixing the files must not leak either."""
    train = {normalise(t) for i in INTENTS for t in templates(train_file, i, "train")}
    held_out = {normalise(t) for i in INTENTS for t in templates(eval_file, i, "eval")}
    assert not train & held_out


@pytest.mark.parametrize(
    ("train_file", "eval_file", "intent"), list(product(FILES, FILES, INTENTS))
)
def test_train_and_eval_skeletons_differ(train_file, eval_file, intent):
    for a, b in product(
        templates(train_file, intent, "train"), templates(eval_file, intent, "eval")
    ):
        assert jaccard(a, b) <= MAX_JACCARD, (a, b, jaccard(a, b))


@each_pool
def test_entries_of_a_pool_vary(name, intent, split):
    pool = POOLS[name][intent][split]
    for form in FORMS:
        for a, b in combinations(pool, 2):
            assert jaccard(a[form], b[form]) <= MAX_JACCARD, (a[form], b[form])


@pytest.mark.parametrize(("name", "split"), list(product(FILES, SPLITS)))
def test_positive_templates_hold_no_negation_cue(name, split):
    for template in templates(name, "positive", split):
        cue = NEGATION_CUE.search(prose(template))
        assert cue is None, (template, cue.group())


@pytest.mark.parametrize(("name", "split"), list(product(FILES, SPLITS)))
def test_negative_templates_hold_a_negation_cue(name, split):
    for template in templates(name, "negative", split):
        assert NEGATION_CUE.search(prose(template)), template


def test_neutral_templates_name_no_film():
    for intent, split in product(INTENTS, SPLITS):
        for template in templates("neutral", intent, split):
            assert not FILM_WORDS.search(template.lower()), template


def test_the_examples_of_the_paper_are_evaluation_templates():
    film = POOLS["film"]
    assert "I feel like watching {a_category} film. What should I see?" in [
        entry["category"] for entry in film["positive"]["eval"]
    ]
    assert "I want to watch something different, so avoid the {category} type." in [
        entry["category"] for entry in film["negative"]["eval"]
    ]
