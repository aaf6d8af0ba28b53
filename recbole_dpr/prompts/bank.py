"""All prompts of a run as rows of one table, embedded once; batches hold row numbers only.

Legend: P rows of the table, D encoder size, V items, C categories.
"""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from recbole_dpr.prompts.meaning import MeaningReader, at_large, network, regressions
from recbole_dpr.prompts.templates import NEGATIVE, POSITIVE, in_sentence

NO_PROMPT = -1
_ENCODED_AT_ONCE = 2**15  # texts whose float32 vectors are in memory at once
# chosen on the held-out sentences and wishes: inverse strength of the penalty, and what the examples without a category
# weigh together, those with one being 1
_LOGISTIC_C, _NONE_WEIGHT = 40.0, 0.5
# of `meaning_reader`, by the likelihood of items left out and by dataset/prompts/category_wishes_dev.tsv: inverse strength of the
# phrases' penalty; then where a category counts as meant, slope and place in log-odds. Of phrases the place is between fixed ones and those
# of the category at large.
_PHRASES_C, _MOST_PHRASES = 1.0, 50_000
_SLOPE, _EVEN, _AT_LARGE = 2.0, -0.5, 0.3
_MEANINGS_SLOPE, _MEANINGS_EVEN = 3.0, -2.0


class PromptTable:
    """Vectors of prompts, of which many are the same: `table[rows]` are those of rows int64 [n] of the prompt table, float [n, D].

    Args:
        vectors: float or float16 [U, D], the distinct ones; row: int64 [P], each prompt's among them; default each is one of its own.
    """

    def __init__(self, vectors, row=None):
        self.vectors, self.row = vectors, torch.arange(len(vectors)) if row is None else row

    def __len__(self):
        return len(self.row)

    def __getitem__(self, rows):
        return self.vectors[self.row[rows]].float()

    def to(self, device):
        return PromptTable(self.vectors.to(device), self.row.to(device))


class PromptBank:
    """The training prompts, and any others that the evaluation asks for by their text.

    Args:
        templates: Templates.
        texts: ItemTexts.
        category_names: C names.
        about: V texts that say what the items are, such as title and categories; "" where nothing is known.
        rng: numpy Generator; draws the one carrier sentence that each training tag is put in.
        carried: put training tags in carrier sentences; not needed where descriptions are read (`embed`).

    Attributes:
        category: two int64 [C, K]: rows of the training prompts for a category by intent; the bare name (first)
            and every template of the pool.
        tag: two int64 [V, 3, F]: rows for a training tag by intent in its forms, bare and, with `carried`, in a
            carrier sentence; `NO_PROMPT` where the item has none.
        wish: int64 [V, 3]: rows of the training wishes.
        phrase: int64 [V, 6]: rows of the bare training phrases, tags then wishes.
        about: int64 [V]: rows of the texts `about`.
        meaning: int64 [n], rows of the texts that are known to mean categories; meant: bool [n, C], which.
        vectors: float16 [P, D], from `embed`, of the texts: what methods are told that read no descriptions, and the
            largest table of a run (320,000 texts with all positions of ml-1m).
        asked: PromptTable of what they ask for, `descriptions`: P texts, U distinct ones.
        tokens: of these, float16 [total, D] and int64 [U + 1] offsets, or None.
    """

    def __init__(self, templates, texts, category_names, about, rng, carried=True):
        self.templates, self.texts, self.category_names = templates, texts, category_names
        self._rows = {}
        self.vectors = self.asked = self.descriptions = self.tokens = None
        self.category = tuple(
            np.array([self._category_training_rows(intent, name) for name in category_names]) for intent in (POSITIVE, NEGATIVE)
        )
        tags, wishes = texts.tags["train"], texts.wishes["train"]
        bare = self.rows(tags)
        self.tag = tuple(
            np.stack([bare, *([self._carried(intent, tags, rng)] if carried else [])], axis=-1)
            for intent in (POSITIVE, NEGATIVE)
        )
        self.wish = self.rows(wishes)
        self.phrase = np.concatenate([bare, self.wish], axis=1)
        self.about = self.rows(np.asarray(about, dtype=object))
        self.meaning = self.rows(np.array([text for text, _ in texts.meanings], dtype=object))
        self.meant = np.array([[name in meant for name in category_names] for _, meant in texts.meanings], dtype=bool).reshape(-1, len(category_names))

    def row(self, text):
        """The row of a text, a new one if it has none; `NO_PROMPT` for ""."""
        return self._rows.setdefault(text, len(self._rows)) if text else NO_PROMPT

    def rows(self, texts):
        """Rows of an array of texts, of its shape."""
        return np.array([self.row(t) for t in texts.ravel()], dtype=np.int64).reshape(texts.shape)

    def category_rows(self, intent, part, categories, template):
        """Rows of the prompts for the categories in these templates of a pool; arrays of one shape."""
        table = np.array([self._category_rows(intent, part, name) for name in self.category_names])
        return table[categories, template]

    def tag_rows(self, intent, part, tags, template):
        """Rows of the prompts for these tags (object array) in these templates of a pool."""
        texts = [self.templates.tag(intent, part, i, t) if t else "" for t, i in zip(tags.ravel(), template.ravel())]
        return self.rows(np.array(texts, dtype=object)).reshape(tags.shape)

    def _category_rows(self, intent, part, name):
        size = self.templates.size("category", intent, part)
        return [self.row(self.templates.category(intent, part, i, name)) for i in range(size)]

    def _category_training_rows(self, intent, name):
        return [self.row(name.lower()), *self._category_rows(intent, "train", name)]

    def _carried(self, intent, tags, rng):
        """Rows of the tags, each in a carrier sentence of its own draw."""
        carriers = self.templates.carriers(intent)
        drawn = rng.integers(len(carriers), size=tags.shape)
        texts = [in_sentence(carriers[i], tag) if tag else "" for tag, i in zip(tags.ravel(), drawn.ravel())]
        return self.rows(np.array(texts, dtype=object)).reshape(tags.shape)

    @property
    def all_texts(self):
        """P texts, in the order of the rows."""
        return list(self._rows)

    def embed(self, encoder, show_progress=False, read=None, with_tokens=False):
        """Encode every text asked for so far: `vectors` and `asked`, and with `with_tokens` also `tokens`.

        Args:
            encoder: PromptEncoder.
            read: texts -> the descriptions in them; None takes prompts as they are.
        """
        texts = self.all_texts
        self.descriptions = self._described(read) if read else texts
        number = {}  # of each distinct description
        row = torch.tensor([number.setdefault(text, len(number)) for text in self.descriptions], dtype=torch.int64)
        parts = [texts[start : start + _ENCODED_AT_ONCE] for start in range(0, len(texts), _ENCODED_AT_ONCE)]
        self.vectors = torch.cat([torch.from_numpy(encoder.encode(part, show_progress)).half() for part in parts])
        self.asked = PromptTable(torch.from_numpy(encoder.encode(number, show_progress)), row)
        if with_tokens:
            flat, offsets = encoder.encode_tokens(number, show_progress)
            self.tokens = torch.from_numpy(flat), torch.from_numpy(offsets)

    def _described(self, read):
        """P texts: the descriptions in all prompts.

        Training phrases, names, texts of known meaning and what items are about stand as they are. So does every second training prompt for a
        category: sentences that the reading fails on have to be understood too.
        """
        texts = np.array(self.all_texts, dtype=object)
        whole = np.zeros(len(texts), dtype=bool)
        for rows in (self.phrase, self.about, self.meaning, *(category[:, ::2] for category in self.category)):
            whole[rows[rows != NO_PROMPT]] = True
        texts[~whole] = read(texts[~whole])
        return texts.tolist()

    def category_reader(self, intent):
        """Logistic regression that tells from what a prompt asks which category it names, or that it names none.

        Trained on every training prompt for a category, whole and read, against all phrases, which name none.
        softmax(asked @ weight + bias) gives the probabilities: the C categories, then none.

        Returns:
            weight float32 [D, C + 1], bias float32 [C + 1].
        """
        category, tags = self.category[intent], self.tag[intent]
        none = np.concatenate([tags[tags != NO_PROMPT], self.phrase[self.phrase != NO_PROMPT]])
        prompts = np.concatenate([self.vectors[category.ravel()], self.asked[category.ravel()], self.asked[none]])
        names = np.repeat(np.arange(len(category)), category.shape[1])
        named = np.concatenate([names, names, np.full(len(none), len(category))])
        weight = np.zeros((prompts.shape[1], len(category) + 1), dtype=np.float32)
        bias = np.full(len(category) + 1, -np.inf, dtype=np.float32)  # of a class without an example
        classes = np.unique(named)
        bias[classes] = 0
        if len(classes) > 1:
            balance = {len(category): _NONE_WEIGHT * 2 * len(names) / len(none)} if len(none) else None  # the others are 1
            fitted = LogisticRegression(C=_LOGISTIC_C, class_weight=balance, max_iter=300).fit(prompts, named)
            # of two classes scikit-learn gives the second alone
            weight[:, classes[-len(fitted.coef_) :]] = fitted.coef_.T
            bias[classes[-len(fitted.coef_) :]] = fitted.intercept_
        return torch.from_numpy(weight), torch.from_numpy(bias)

    def meaning_reader(self, categories, seed, folder, show_progress=False):
        """What tells from what a prompt asks which categories it means, whether it names them or not.

        Of categories that texts are known to mean a network trained on those. Of others logistic regressions on all training phrases
        (or, without any, on what items are about), each of which describes an item, and so may mean its categories.

        Args:
            categories: bool tensor [V, C]; seed: int; folder: where networks are kept, as for `TextCache`.

        Returns:
            MeaningReader.
        """
        told = torch.from_numpy(self.meant.any(0))
        reader = MeaningReader(self.asked.vectors.shape[1], len(told))
        if not told.all():
            rows = self.phrase if (self.phrase != NO_PROMPT).any() else self.about[:, None]
            item, column = np.nonzero(rows != NO_PROMPT)
            some = slice(None, None, -(-len(item) // _MOST_PHRASES) or None)
            has = categories[item[some]][:, ~told].float()
            fitted = regressions(self.asked[rows[item[some], column[some]]], has, _PHRASES_C)
            fitted[-1] -= _AT_LARGE * at_large(has) + (1 - _AT_LARGE) * _EVEN
            reader.linear[:, ~told] = _SLOPE * fitted
        if told.any():
            meant = torch.from_numpy(self.meant[:, told.numpy()]).float()
            hidden, output = network(self.asked[self.meaning], meant, seed, folder, show_progress)
            reader.hidden.copy_(hidden)
            reader.output[:, told] = _MEANINGS_SLOPE * output[:-1]
            reader.linear[:, told] = 0
            reader.linear[-1, told] = _MEANINGS_SLOPE * (output[-1] - _MEANINGS_EVEN)
        return reader
