"""All prompts of a run as rows of one table, embedded once; batches hold row numbers only.

Legend: P rows of the table, D encoder size, V items, C categories.
"""

import numpy as np
import torch

from recbole_dpr.prompts.templates import NEGATIVE, POSITIVE, in_sentence

NO_PROMPT = -1
_RIDGE = 10.0  # of 10, 100 and 1000 the best on validation (mpnet, by wish)


class PromptBank:
    """The training prompts, and any others that the evaluation asks for by their text.

    Args:
        templates: Templates.
        texts: ItemTexts.
        category_names: C names.
        titles: V titles, the item side's text where an item has no phrases.
        rng: numpy Generator; draws the one carrier sentence that each training tag is put in.

    Attributes:
        category: two int64 [C, K]: rows of the training prompts for a category by intent; the bare name (first),
            every template of the pool and every carrier sentence.
        tag: two int64 [V, 3, 2]: rows for a training tag by intent, bare and in a carrier sentence;
            `NO_PROMPT` where the item has none.
        wish: int64 [V, 3]: rows of the training wishes.
        phrase: int64 [V, 6]: rows of the bare training phrases, tags then wishes: the item side.
        title: int64 [V]: rows of the titles of items without phrases, their item side.
    """

    def __init__(self, templates, texts, category_names, titles, rng):
        self.templates, self.texts, self.category_names = templates, texts, category_names
        self._rows = {}
        self.vectors = None
        self.category = tuple(
            np.array([self._category_training_rows(intent, name) for name in category_names]) for intent in (POSITIVE, NEGATIVE)
        )
        tags, wishes = texts.tags["train"], texts.wishes["train"]
        bare = self.rows(tags)
        self.tag = tuple(
            np.stack([bare, self._carried(intent, tags, rng)], axis=-1)
            for intent in (POSITIVE, NEGATIVE)
        )
        self.wish = self.rows(wishes)
        self.phrase = np.concatenate([bare, self.wish], axis=1)
        untold = (self.phrase == NO_PROMPT).all(axis=1)
        self.title = self.rows(np.where(untold, np.asarray(titles, dtype=object), ""))

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
        size = self.templates.size(intent, part)
        return [self.row(self.templates.category(intent, part, i, name)) for i in range(size)]

    def _category_training_rows(self, intent, name):
        carried = [self.row(in_sentence(form, name)) for form in self.templates.carriers(intent)]
        return [self.row(name.lower()), *self._category_rows(intent, "train", name), *carried]

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

    def embed(self, encoder, show_progress=False):
        """Encode every text asked for so far; the table is `vectors`, float32 [P, D]."""
        self.vectors = torch.from_numpy(encoder.encode(self.all_texts, show_progress=show_progress))

    def item_phrases(self):
        """The rows that describe each item: its training phrases, else its title; int64 [V, 6], `NO_PROMPT` where none."""
        phrases = self.phrase.copy()
        phrases[:, 0] = np.where(self.title != NO_PROMPT, self.title, phrases[:, 0])
        return phrases

    def unwrapping(self, intent):
        """The linear map that takes the sentence around a description away: p -> p (I + M).

        Ridge regression in closed form: from every training tag in its carrier sentence to the bare tag, from every
        training prompt for a category to the bare name, and from bare phrases to themselves.

        Returns:
            M, float32 [D, D].
        """
        category, tags, own = self._known(intent)
        source = np.concatenate([category.ravel(), tags[:, 1], own])
        target = np.concatenate([np.repeat(category[:, 0], category.shape[1]), tags[:, 0], own])
        source, target = self.vectors[source].double(), self.vectors[target].double()
        return _ridge_regression(source, target - source).float()

    def category_reader(self, intent, unwrapping):
        """The linear map that tells from an unwrapped prompt which categories it names: p -> about 1 for these, 0 else.

        Ridge regression in closed form: every training prompt for a category, against all phrases, which name none;
        both groups weigh the same.

        Args:
            unwrapping: float32 [D, D], the map of this intent.

        Returns:
            float32 [D, C].
        """
        category, tags, own = self._known(intent)
        described = np.concatenate([tags.ravel(), own])
        prompts = self.vectors[np.concatenate([category.ravel(), described])]
        prompts = torch.nn.functional.normalize(prompts + prompts @ unwrapping, dim=1).double()
        names = torch.zeros(len(prompts), len(category), dtype=torch.float64)
        names[torch.arange(category.size), torch.arange(len(category)).repeat_interleave(category.shape[1])] = 1
        weight = torch.ones(len(prompts), 1, dtype=torch.float64)
        weight[: category.size] = max(1, len(described) / category.size)
        return _ridge_regression(prompts, names, weight).float()

    def _known(self, intent):
        """Rows of all that training knows of this intent: categories [C, K], tags [n, 2] (bare, carried), bare phrases [m]."""
        tags = self.tag[intent]
        return self.category[intent], tags[tags[..., 0] != NO_PROMPT], self.phrase[self.phrase != NO_PROMPT]


def _ridge_regression(source, target, weight=1.0):
    """M with source M ~ target: source float64 [n, D], target [n, k], weight [n, 1] of the rows."""
    weighted = weight * source
    penalty = _RIDGE * torch.eye(source.shape[1], dtype=source.dtype)
    return torch.linalg.solve(source.T @ weighted + penalty, weighted.T @ target)
