"""The methods that are compared: each scores all items for a batch of prompted queries.

Legend: B queries of a batch, V items, d hidden, S size of the item side.
Every `score` takes (PromptedQueries, int64 rows [B]) and returns float [B, V]; `depends_on` takes PromptedQueries and
returns int64 [Q, n]: queries that agree in it have one ranking.
"""

import numpy as np
import torch

from recbole_dpr.prompts.bank import NO_PROMPT


class StateTable:
    """States of the positions that queries ask about, each computed once."""

    def __init__(self, evaluator, model, prompted_sets, show_progress=False):
        self.positions = np.unique(np.concatenate([p.queries.position for p in prompted_sets]))
        self.states = evaluator.states(model, self.positions, show_progress)

    def __call__(self, prompted, rows):
        index = np.searchsorted(self.positions, prompted.queries.position[rows])
        return self.states[torch.from_numpy(index).to(self.states.device)]


class Base:
    """The backbone alone; the prompt is ignored.

    Args:
        states: StateTable; items: float [V, d].
    """

    def __init__(self, states, items):
        self.states, self.items = states, items

    def score(self, prompted, rows):
        return self.states(prompted, rows) @ self.items.T

    def depends_on(self, prompted):
        return prompted.queries.position[:, None]


class Filter:
    """A method's ranking restricted to items with the category (POS) or without it (NEG).

    Args:
        method: the method restricted; categories: bool tensor [V, C].
    """

    def __init__(self, method, categories):
        self.method, self.categories = method, categories.T.contiguous()

    def score(self, prompted, rows):
        scores = self.method.score(prompted, rows)
        has = self.categories[torch.from_numpy(prompted.queries.category[rows]).to(scores.device)]
        return scores.masked_fill_(has if prompted.queries.task == "NEG" else ~has, -torch.inf)

    def depends_on(self, prompted):
        task = np.full(len(prompted), prompted.queries.task == "NEG")
        return np.column_stack([self.method.depends_on(prompted), prompted.queries.category, task])


class Prompted:
    """A DPR model.

    Args:
        states: StateTable of its backbone; answering: of the backbone that prompted requests go through, None if it
            is the same.
    """

    def __init__(self, states, answering, model):
        self.states, self.answering, self.model = states, answering or states, model
        self.items = model.item_vectors()

    def score(self, prompted, rows):
        state = self.states(prompted, rows)
        if prompted.kind == "none":
            return self.model.unprompted_vectors(state) @ self.items.T
        vectors, tokens = self._read(torch.from_numpy(prompted.prompt[rows]).to(state.device))
        answering = self.answering(prompted, rows)
        return self.model.prompted_vectors(state, answering, vectors, prompted.queries.intent, tokens) @ self.items.T

    def depends_on(self, prompted):
        return np.column_stack([prompted.queries.position, _asked(prompted)])

    def _read(self, prompt):
        """What the model is told: vectors [B, D] of rows of the prompt table, and their token keys (or None)."""
        return self.model.prompt_vectors[prompt], self.model.tokens_of(prompt)


class RandomPrompts(Prompted):
    """DPR-Rand: a DPR model that meets a random vector of norm 1 in the place of every prompt (arXiv:2602.18929).

    What it keeps above Base is not the prompts' doing. With token keys that vector is the only token.
    """

    def __init__(self, states, answering, model, seed):
        super().__init__(states, answering, model)
        table = torch.randn(model.prompt_vectors.shape, generator=torch.Generator().manual_seed(seed))
        self.vectors = torch.nn.functional.normalize(table, dim=1).to(model.prompt_vectors.device)

    def _read(self, prompt):
        vectors = self.vectors[prompt]
        tokens = (vectors[:, None], torch.zeros(len(vectors), 1, dtype=torch.bool, device=vectors.device))
        return vectors, tokens if self.model.token_keys else None


class TextFit:
    """How well the prompt fits an item's text; no model.

    A negative prompt ranks by the negative of it. A prompt that repeats a training phrase (validation by tag) meets
    its item without that phrase.

    Args:
        text: ItemText; prompts: float [P, D], the prompt table.
    """

    def __init__(self, text, prompts):
        self.text, self.prompts = text, prompts

    def score(self, prompted, rows):
        device = self.text.vectors.device
        asked = self.prompts[torch.from_numpy(prompted.prompt[rows])].to(device)
        fit = asked @ self.text.vectors.T + self.text.offsets
        own = torch.from_numpy(prompted.own_phrase[rows])
        repeats = torch.nonzero(own != NO_PROMPT).squeeze(1)
        if len(repeats):
            items = torch.from_numpy(prompted.queries.spoken_of[rows])[repeats].to(device)
            left, offset = self.text.without(items, self.prompts[own[repeats]].to(device))
            repeats = repeats.to(device)
            fit[repeats, items] = (asked[repeats] * left).sum(1) + offset
        return fit if prompted.queries.task == "POS" else -fit

    def depends_on(self, prompted):
        spoken_of = np.where(prompted.own_phrase == NO_PROMPT, 0, prompted.queries.spoken_of)
        return np.column_stack([prompted.queries.position, _asked(prompted), prompted.own_phrase, spoken_of])


class WeightedSum:
    """Base score + w x fit of the text: the form of CTRL-Rec (arXiv:2510.12742)."""

    def __init__(self, base, text, weight):
        self.base, self.text, self.weight = base, text, weight

    def score(self, prompted, rows):
        return self.base.score(prompted, rows).add_(self.text.score(prompted, rows), alpha=self.weight)

    def depends_on(self, prompted):
        return self.text.depends_on(prompted)


def _asked(prompted):
    """int64 [Q, 2]: the prompt, -1 for none, and the intent."""
    prompt = np.full(len(prompted), -1) if prompted.kind == "none" else prompted.prompt
    return np.column_stack([prompt, np.full(len(prompted), prompted.queries.intent)])


def tuned_weight(evaluator, base, text, sets, grid, metric="NDCG@10"):
    """The w of `WeightedSum` with the best validation metric.

    Args:
        sets: list of PromptedQueries of the validation part, which count alike; grid: weights to try.

    Returns:
        the weight, and its metric.
    """

    def mean(weight):
        return sum(evaluator.mean(prompted, WeightedSum(base, text, weight).score)[metric] for prompted in sets) / len(sets)

    best, weight = max((mean(w), w) for w in grid)
    return weight, best
