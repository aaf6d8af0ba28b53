"""What is written of items: semantic tags and wishes, matched to a dataset's items.

The columns of a part (train, valid, eval) serve that part alone. File form: dataset/README.md.
"""

import csv
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from recbole_dpr.errors import UserError
from recbole_dpr.resources import dataset_dir

TAG_COLUMNS = {"train": ("narrative", "atmosphere", "appeal"), "eval": ("eval_narrative", "eval_atmosphere", "eval_appeal")}
WISH_COLUMNS = {"train": ("wish_1", "wish_2", "wish_3"), "valid": ("valid_wish",), "eval": ("eval_wish",)}
_ARTICLES = {"the", "a", "an", "la", "le", "les", "l", "il", "el", "los", "las", "das", "der", "die"}


@dataclass(frozen=True)
class ItemTexts:
    """Phrases of every item, "" where there is none.

    Attributes:
        tags: part -> object array [V, 3] of tag phrases (train, eval).
        wishes: part -> object array [V, 3 or 1] of first-person requests (train, valid, eval).
        meanings: [(text, set of category names), …], what people may ask of any item and the categories that they mean; they train.
    """

    tags: dict
    wishes: dict
    meanings: list = field(default_factory=list)

    @property
    def has_tags(self):
        return bool((self.tags["train"] != "").any())

    @property
    def has_wishes(self):
        return bool((self.wishes["train"] != "").any())

    def coverage(self):
        """Share of the items (padding aside) that have a training tag."""
        return float((self.tags["train"][1:] != "").any(axis=1).mean())


def load_item_texts(name, item_tokens, titles, years, id_column):
    """Read tags.tsv and wishes.tsv and match their rows to items; read meanings.tsv and requests.tsv.

    Args:
        name: a folder, a name of the shipped ones below dataset/, or None for no texts.
        item_tokens, titles, years: V strings each, row 0 is padding.
        id_column: the column with the dataset's item ids, or `title` to match by title and year.

    Returns:
        ItemTexts.

    Raises:
        UserError: no such folder, no tags.tsv in it, a column is missing, or no row matches any item.
    """
    empty = {part: _blank(len(item_tokens), columns) for part, columns in TAG_COLUMNS.items()}
    texts = ItemTexts(empty, {part: _blank(len(item_tokens), columns) for part, columns in WISH_COLUMNS.items()})
    if name is None:
        return texts
    folder = Path(name) if Path(name).is_dir() else dataset_dir() / str(name)
    if not (folder / "tags.tsv").is_file():
        shipped = sorted(p.parent.name for p in dataset_dir().glob("*/tags.tsv"))
        raise UserError(
            f"item_texts={name!r}: no tags.tsv there; give a folder that has one, a shipped name "
            f"({', '.join(shipped)}), or item_texts=~ to go without"
        )
    matched = _fill(texts.tags, TAG_COLUMNS, folder / "tags.tsv", item_tokens, titles, years, id_column)
    if (folder / "wishes.tsv").is_file():
        _fill(texts.wishes, WISH_COLUMNS, folder / "wishes.tsv", item_tokens, titles, years, id_column)
    for file, read in (("meanings.tsv", _meanings), ("requests.tsv", _requests)):
        if (folder / file).is_file():
            texts.meanings.extend(read(folder / file))
    if not matched:
        raise UserError(
            f"item_texts={name!r}: none of its rows matches an item of the dataset by '{id_column}'; "
            "name the column with the item ids with --ITEM_TEXT_ID=, or `title`"
        )
    return texts


def title_key(title, year=""):
    """Words of a title without case, accents, articles, punctuation and order, with the year.

    The data sets spell one film as "City of Lost Children, The" and "Lost Children, The City of".

    >>> title_key("Postino, Il (The Postman) (1994)") == title_key("The Postman (Il Postino)", "1994")
    True
    """
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    match = re.search(r"\((\d{4})\)\s*$", plain)
    if match:
        plain, year = plain[: match.start()], match[1]
    words = re.findall(r"[a-z0-9]+", plain.replace("'", ""))
    return " ".join(sorted(w for w in words if w not in _ARTICLES)) + f" {year}"


def _blank(n_items, columns):
    return np.full((n_items, len(columns)), "", dtype=object)


def _fill(arrays, columns, path, item_tokens, titles, years, id_column):
    """Write the file's phrases into the rows of the items that they belong to; returns how many matched."""
    with open(path, encoding="utf-8", newline="") as f:
        rows = csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
        _check_columns(rows, path, [id_column, *(c for part in columns.values() for c in part)])
        if id_column == "title":
            keys = [title_key(t, y) for t, y in zip(titles[1:], years[1:])]
            key_of = lambda row: title_key(row["title"])  # noqa: E731
        else:
            keys = list(item_tokens[1:])
            key_of = lambda row: row[id_column]  # noqa: E731
        items = {}
        for item, key in enumerate(keys, start=1):
            items.setdefault(key, []).append(item)
        matched = 0
        for row in rows:
            for item in items.pop(key_of(row), ()):
                matched += 1
                for part, names in columns.items():
                    arrays[part][item] = [row[c] or "" for c in names]
    return matched


def _meanings(path):
    """Each text, and the categories in its cell; a row without a text says nothing."""
    with open(path, encoding="utf-8", newline="") as f:
        rows = csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
        _check_columns(rows, path, ["text", "categories"])
        yield from ((row["text"], _categories(row["categories"] or "-")) for row in rows if row["text"])


def _requests(path):
    """What each clause of a request means, and the whole request where all of its clauses are of one intent."""
    with open(path, encoding="utf-8", newline="") as f:
        rows = csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
        _check_columns(rows, path, ["text", "clauses", "categories"])
        for line, row in enumerate(rows, start=2):
            clauses = [clause.rpartition("||") for clause in row["clauses"].split(" ## ")]
            meant = [_categories(cell) for cell in row["categories"].split(" ## ")]
            if len(clauses) != len(meant):
                raise UserError(f"{path.name} in {path.parent}, line {line}: {len(clauses)} clauses and {len(meant)} cells of categories; one for each is needed, `-` for none")
            yield from ((text, categories) for (text, _, _), categories in zip(clauses, meant))
            if len({intent for _, _, intent in clauses}) == 1:
                yield row["text"], set().union(*meant)


def _categories(cell):
    return set(cell.split("|")) - {"-"}


def _check_columns(rows, path, needed):
    missing = [c for c in needed if c not in (rows.fieldnames or ())]
    if missing:
        raise UserError(f"{path.name} in {path.parent}: no column {', '.join(missing)} (it has {', '.join(rows.fieldnames or ())})")
