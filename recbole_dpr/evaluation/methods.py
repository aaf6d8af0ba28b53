"""The methods that are compared: each scores all items for a batch of prompted queries.

Legend: B queries of a batch, V items, d hidden, S size of the item side.
Every `score` takes (PromptedQueries, int64 rows [B]) and returns float [B, V]; `depends_on` takes PromptedQueries and
returns int64 [Q, n]: queries that agree in it have one ranking.
"""

import numpy as np
import torch

from recbole_dpr.prompts.bank import NO_PROMPT, PromptTable

_ROWS_AT_ONCE = 64  # whose fit is copied out of that of their prompts


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
        self.prompts, self.plain = model.prompt_vectors, model.item_matrix()
        self.text = model.item_side[:, : model.text_size + 1]
        self.learned = torch.cat([model.backbone_items(), model.item_side[:, model.text_size + 1 :]], dim=1)

    def score(self, prompted, rows):
        """As `Promptable.full_sort_predict`, but the fit of the text is found once for each distinct prompt of the batch."""
        state = self.states(prompted, rows)
        if prompted.kind == "none":
            return state @ self.plain.T
        prompt = torch.from_numpy(prompted.prompt[rows]).to(state.device)
        vectors, answering = self.prompts[prompt], self.answering(prompted, rows)
        own, weights = self.model.prompted_parts(state, answering, vectors, prompted.queries.intent, self._tokens(prompt))
        if weights is None:
            return own @ self.learned.T
        scores = torch.cat([own, weights[:, 1:]], dim=1) @ self.learned.T
        distinct, row = torch.unique(self.prompts.row[prompt], return_inverse=True)
        fit = torch.addmm(self.text[:, -1], self.prompts.vectors[distinct], self.text[:, :-1].T)
        for start in range(0, len(scores), _ROWS_AT_ONCE):
            here = slice(start, start + _ROWS_AT_ONCE)
            scores[here].addcmul_(fit[row[here]], weights[here, :1])
        return scores

    def depends_on(self, prompted):
        return np.column_stack([_asked(prompted, self.prompts), prompted.queries.position])  # in this order: few prompts in a batch

    def _tokens(self, prompt):
        return self.model.tokens_of(prompt)


class RandomPrompts(Prompted):
    """DPR-Rand: a DPR model that meets a random vector of norm 1 in the place of every prompt (arXiv:2602.18929).

    What it keeps above Base is not the prompts' doing. With token keys that vector is the only token.
    """

    def __init__(self, states, answering, model, seed):
        super().__init__(states, answering, model)
        known = self.prompts.vectors
        table = torch.randn(known.shape, generator=torch.Generator().manual_seed(seed))
        self.prompts = PromptTable(torch.nn.functional.normalize(table, dim=1).to(known.device), self.prompts.row)

    def _tokens(self, prompt):
        if not self.model.token_keys:
            return None
        return self.prompts[prompt][:, None], torch.zeros(len(prompt), 1, dtype=torch.bool, device=prompt.device)


class TextFit:
    """How well the prompt fits an item's text; no model.

    A negative prompt ranks by the negative of it. A prompt that repeats a training phrase (validation by tag) meets
    its item without that phrase.

    Args:
        text: ItemText; prompts: PromptTable.
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
        return np.column_stack([_asked(prompted, self.prompts), prompted.queries.position, prompted.own_phrase, spoken_of])


class WeightedSum:
    """Base score + w x fit of the text: the form of CTRL-Rec (arXiv:2510.12742)."""

    def __init__(self, base, text, weight):
        self.base, self.text, self.weight = base, text, weight

    def score(self, prompted, rows):
        return self.base.score(prompted, rows).add_(self.text.score(prompted, rows), alpha=self.weight)

    def depends_on(self, prompted):
        return self.text.depends_on(prompted)


def _asked(prompted, prompts):
    """int64 [Q, 2]: which of the distinct prompts, -1 for none, and the intent."""
    prompt = np.full(len(prompted), -1) if prompted.kind == "none" else prompts.row.numpy(force=True)[prompted.prompt]
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
