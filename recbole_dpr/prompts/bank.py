"""All prompts of a run as rows of one table, embedded once; batches hold row numbers only.

Legend: P rows of the table, D encoder size, V items, C categories.
"""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from recbole_dpr.prompts.templates import NEGATIVE, POSITIVE, in_sentence

NO_PROMPT = -1
_RIDGE = 10.0  # of 10, 100 and 1000 the best on validation (mpnet, by wish)
_LOGISTIC_C = 10.0  # inverse strength of the penalty; of 1 and 10 the better one on held-out sentences


class PromptBank:
    """The training prompts, and any others that the evaluation asks for by their text.

    Args:
        templates: Templates.
        texts: ItemTexts.
        category_names: C names.
        about: V texts that say what the items are, such as title and categories; "" where nothing is known.
        rng: numpy Generator; draws the one carrier sentence that each training tag is put in.

    Attributes:
        category: two int64 [C, K]: rows of the training prompts for a category by intent; the bare name (first),
            every template of the pool and every carrier sentence.
        tag: two int64 [V, 3, 2]: rows for a training tag by intent, bare and in a carrier sentence;
            `NO_PROMPT` where the item has none.
        wish: int64 [V, 3]: rows of the training wishes.
        phrase: int64 [V, 6]: rows of the bare training phrases, tags then wishes.
        about: int64 [V]: rows of the texts `about`.
    """

    def __init__(self, templates, texts, category_names, about, rng):
        self.templates, self.texts, self.category_names = templates, texts, category_names
        self._rows = {}
        self.vectors = self.tokens = None
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
        self.about = self.rows(np.asarray(about, dtype=object))

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

    def embed(self, encoder, show_progress=False, with_tokens=False):
        """Encode every text asked for so far.

        The table is `vectors`, float32 [P, D]; `tokens` are None, or float16 [total, D] and their offsets, int64 [P + 1].
        """
        self.vectors = torch.from_numpy(encoder.encode(self.all_texts, show_progress=show_progress))
        if with_tokens:
            flat, offsets = encoder.encode_tokens(self.all_texts, show_progress)
            self.tokens = torch.from_numpy(flat), torch.from_numpy(offsets)

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
        penalty = _RIDGE * torch.eye(source.shape[1], dtype=torch.float64)
        return torch.linalg.solve(source.T @ source + penalty, source.T @ (target - source)).float()

    def category_reader(self, intent):
        """Logistic regression that tells from a prompt which category it names, or that it names none.

        Trained on every training prompt for a category, against all phrases, which name none; all classes weigh the
        same. softmax(prompt @ weight + bias) gives the probabilities: the C categories, then none.

        Returns:
            weight float32 [D, C + 1], bias float32 [C + 1].
        """
        category, tags, own = self._known(intent)
        none = np.concatenate([tags.ravel(), own])
        prompts = self.vectors[np.concatenate([category.ravel(), none])].numpy()
        named = np.concatenate([np.repeat(np.arange(len(category)), category.shape[1]), np.full(len(none), len(category))])
        weight = np.zeros((prompts.shape[1], len(category) + 1), dtype=np.float32)
        bias = np.full(len(category) + 1, -np.inf, dtype=np.float32)  # of a class without an example
        classes = np.unique(named)
        bias[classes] = 0
        if len(classes) > 1:
            fitted = LogisticRegression(C=_LOGISTIC_C, class_weight="balanced", max_iter=300).fit(prompts, named)
            # of two classes scikit-learn gives the second alone
            weight[:, classes[-len(fitted.coef_) :]] = fitted.coef_.T
            bias[classes[-len(fitted.coef_) :]] = fitted.intercept_
        return torch.from_numpy(weight), torch.from_numpy(bias)

    def _known(self, intent):
        """Rows of all that training knows of this intent: categories [C, K], tags [n, 2] (bare, carried), bare phrases [m]."""
        tags = self.tag[intent]
        return self.category[intent], tags[tags[..., 0] != NO_PROMPT], self.phrase[self.phrase != NO_PROMPT]
