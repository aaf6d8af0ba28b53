"""Wishes of two clauses: which way to combine them finds what is wished for; nothing is trained.

    python benchmarks/compound.py RUN_FOLDER [--data_path=FOLDER] [--prompt_encoder=FOLDER]

RUN_FOLDER is a finished run of a DPR model. The tasks are drawn like POS and NEG, from the window of the next N items:

    POS+NEG   one item that has a category which the immediate next item lacks, and lacks one that the next item has
    POS+POS   one item that has two categories which the next item lacks
    NEG+NEG   all items without two categories of the next item

Each wish is told twice: as clauses, each a template of the evaluation with its intent, so that only the combination is
measured; and as one text, which the router takes apart first. Weights are chosen on the validation part. Prints Markdown.

Legend: P positions, Q queries, N window, C categories, B queries of a batch, M clauses of all of them, R size of the
retrieval vectors.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from recbole_dpr.benchmark.compare import paired_p
from recbole_dpr.cli import parse_settings
from recbole_dpr.config import make_config
from recbole_dpr.data import targets
from recbole_dpr.data.dataset import NO_ITEM, TEST, VALID
from recbole_dpr.evaluation import methods
from recbole_dpr.evaluation.evaluator import Evaluator
from recbole_dpr.evaluation.queries import QuerySet, evaluated_positions, reachable
from recbole_dpr.materials import prepare_queries, read_sequences
from recbole_dpr.prompts.intent import parse_prompt
from recbole_dpr.prompts.templates import NEGATIVE, POSITIVE
from recbole_dpr.serving.recommender import load
from recbole_dpr.yamlfile import read_yaml

FORMS = {"POS+NEG": (POSITIVE, NEGATIVE), "POS+POS": (POSITIVE, POSITIVE), "NEG+NEG": (NEGATIVE, NEGATIVE)}
# whole wishes, as people would put them; {0} and {1} are the names of the categories
TEXTS = {
    "POS+NEG": (
        *("{0}, but no {1}", "less {1}, more {0}", "no {1}, give me {0} instead", "some {0} without any {1}"),
        *("I'm in the mood for {0}, just don't show me {1}", "I'm tired of {1}. How about {0}?"),
    ),
    "POS+POS": (
        *("{0} and {1}", "{0} with {1} in it", "I'd like {0}, and {1} too", "a mix of {0} and {1}"),
        *("something that is both {0} and {1}", "I want {0}. And some {1}, please."),
    ),
    "NEG+NEG": (
        *("no {0} and no {1}", "neither {0} nor {1}", "anything without {0} or {1}", "enough {0}, and enough {1}"),
        *("I don't want {0}, and please no {1}", "Skip the {0}. Leave out {1} as well."),
    ),
}
_WEIGHTS = (0.35, 0.5, 0.7, 1, 1.4, 2)  # of a clause's move, by intent
TODAY = "additive, states' share / n"
_METRICS = ("NDCG@10", "Recall@10")


# --- the tasks


def compound_in_window(sequences, positions, n, form, rng):
    """Targets of a wish of two clauses.

    Args:
        positions: int [P]; n: the window; form: one of `FORMS`; rng: numpy Generator.

    Returns:
        Targets; category int64 [P', 2], of the first clause and the second; K = 1, but n for NEG+NEG, padded anywhere.
    """
    items = targets.window(sequences, positions, n)  # [P, N]
    has = sequences.categories[items] & (items != NO_ITEM)[:, :, None]  # [P, N, C]
    next_has = sequences.categories[sequences.items[positions]]  # [P, C]
    new = has & ~next_has[:, None, :]
    if form == "NEG+NEG":
        rows = np.flatnonzero(next_has.sum(axis=1) >= 2)
        avoided = _two(rng, next_has[rows])
        violates = np.take_along_axis(has[rows], avoided[:, None, :], axis=2).any(axis=2)  # [P', N]
        found = np.where(violates, NO_ITEM, items[rows])
        any_left = (found != NO_ITEM).any(axis=1)
        return targets.Targets(rows[any_left], found[any_left], avoided[any_left])
    if form == "POS+POS":
        candidate = new.sum(axis=2) >= 2  # [P, N]
        rows = np.flatnonzero(candidate.any(axis=1))
        choice = targets.draw(rng, candidate[rows])
        return targets.Targets(rows, items[rows, choice][:, None], _two(rng, new[rows, choice]))
    rows = np.flatnonzero(next_has.any(axis=1))
    avoided = targets.draw(rng, next_has[rows])
    new = new[rows] & ~np.take_along_axis(has[rows], avoided[:, None, None], axis=2)  # [P', N, C]
    some = new.any(axis=(1, 2))
    rows, avoided, new = rows[some], avoided[some], new[some]
    choice = targets.draw(rng, new.any(axis=2))
    wanted = targets.draw(rng, new[np.arange(len(rows)), choice])
    return targets.Targets(rows, items[rows, choice][:, None], np.stack([wanted, avoided], axis=1))


def _two(rng, mask):
    """Two true columns of each row, int64 [P, 2]."""
    first = targets.draw(rng, mask)
    return np.stack([first, targets.draw(rng, mask & (np.arange(mask.shape[1]) != first[:, None]))], axis=1)


@dataclass(frozen=True, eq=False)
class Wishes:
    """A query set and its wishes, as `Evaluator` takes them.

    Attributes:
        queries: QuerySet whose category is int64 [Q, 2].
        texts: Q whole wishes; the single expert that is told them takes the intent of the first clause.
        prompt: float [M, D] vectors of all clauses; intent, owner: int64 [M], the query that a clause belongs to.
    """

    queries: QuerySet
    texts: list
    prompt: torch.Tensor
    intent: torch.Tensor
    owner: torch.Tensor

    def __len__(self):
        return len(self.queries)


def query_sets(sequences, config, part):
    """A QuerySet for each form and window."""
    position, sets = evaluated_positions(sequences, config["eval_positions"], part), []
    for (number, form), n in product(enumerate(FORMS), config["windows"]):
        room = sequences.part_end[position] - position
        inside = position if config["short_windows"] else position[room >= n]
        rng = np.random.default_rng([config["seed"], part, 10 + number, n])
        found = compound_in_window(sequences, inside, n, form, rng)
        at = inside[found.rows]
        queries = QuerySet(form, n, at, found.items, found.category, np.zeros_like(at), rng.random((len(at), 3)))
        sets.append(reachable(sequences, config, queries))
    return sets


def told_as_clauses(queries, rec, bank, part):
    """Wishes of two templates of the evaluation, whose intents are known."""
    pool, told = "valid" if part == VALID else "eval", []
    for column, intent in enumerate(FORMS[queries.task]):
        template = (queries.draws[:, column] * bank.templates.size("category", intent, pool)).astype(np.int64)
        told.append(bank.category_rows(intent, pool, queries.category[:, column], template))
    texts = np.array(bank.all_texts, dtype=object)[np.stack(told, axis=1)]  # [Q, 2]
    intent = torch.tensor(FORMS[queries.task]).repeat(len(queries))
    return Wishes(queries, [" ".join(pair) for pair in texts], _vectors(rec, texts.ravel(), sentences=True), intent, torch.arange(len(queries)).repeat_interleave(2))


def told_as_text(queries, rec, names):
    """Wishes of one text each, through the router."""
    forms, names = TEXTS[queries.task], [name.lower() for name in names]
    which = (queries.draws[:, 2] * len(forms)).astype(np.int64)
    texts = [forms[i].format(*(names[c] for c in pair)) for i, pair in zip(which, queries.category)]
    parsed = {text: parse_prompt(text) for text in set(texts)}
    clauses = [(row, clause) for row, text in enumerate(texts) for clause in parsed[text]]
    intent = torch.tensor([clause.expert for _, clause in clauses])
    return Wishes(queries, texts, _vectors(rec, [clause.text for _, clause in clauses]), intent, torch.tensor([row for row, _ in clauses]))


def _vectors(rec, texts, sentences=False):
    distinct, row = np.unique(np.array(texts, dtype=str), return_inverse=True)
    return torch.from_numpy(rec.prompt_vectors(distinct.tolist(), sentences))[torch.from_numpy(row)]


# --- the methods


def first_clause(model, plain, answering, prompt, intent, owner):
    """[B, R]: the others are not heard."""
    first = _number_within(owner) == 0
    return model.prompted_vectors(plain, answering, prompt[first], intent[first])


def sequential(model, plain, answering, prompt, intent, owner):
    """[B, R]: the state that one expert gives goes into the next; what they ask of the item side adds up."""
    vectors, number = model.resting_vectors(plain, answering), _number_within(owner)
    side = vectors.shape[1] - model.item_side.shape[1]  # where the item side starts
    for step in range(int(number.max()) + 1):
        now = number == step
        rows = owner[now]
        told = model.prompted_vectors(plain[rows], vectors[rows, side - model.state_size : side], prompt[now], intent[now])
        told[:, side:] += vectors[rows, side:]
        vectors[rows] = told
    return vectors


def additive(share=lambda n: 1.0, weights=(1.0, 1.0), state_share=None):
    """The moves of all clauses on top of the state at rest.

    Args:
        share: n clauses -> what each move is multiplied with; weights: the same by intent, where there are several clauses;
        state_share: as share, for the part of a move that is not the item side's.
    """

    def combine(model, plain, answering, prompt, intent, owner):
        resting = model.resting_vectors(plain, answering)
        moves = model.prompted_vectors(plain[owner], answering[owner], prompt, intent) - resting[owner]
        n = torch.bincount(owner, minlength=len(plain))[owner, None].float()
        scale = torch.where(n > 1, torch.tensor(weights)[intent, None], 1.0) * share(n)
        if state_share:
            states = moves.shape[1] - model.item_side.shape[1]
            scale = torch.cat([(scale * state_share(n)).expand(-1, states), scale.expand(-1, moves.shape[1] - states)], dim=1)
        return resting.index_add(0, owner, scale * moves)

    return combine


def _number_within(owner):
    """The number of each clause within its wish; owner ascending."""
    starts = torch.searchsorted(owner, owner)
    return torch.arange(len(owner)) - starts


COMBINATIONS = {
    "first clause only": first_clause,
    "sequential": sequential,
    "additive": additive(),
    "additive, moves / √n": additive(lambda n: n**-0.5),
    "mean of the moves": additive(lambda n: 1 / n),
    "additive, states' share / √n": additive(state_share=lambda n: n**-0.5),
    TODAY: additive(state_share=lambda n: 1 / n),
}


class Combined:
    """A way to combine clauses, as a method of the evaluation.

    Args:
        plain, answering: StateTable of the two backbones; combine: (model, plain, answering, prompt, intent, owner) -> [B, R].
    """

    def __init__(self, model, plain, answering, combine):
        self.model, self.plain, self.answering, self.combine = model, plain, answering, combine
        self.items = model.item_vectors()

    def score(self, wishes, rows):
        own = torch.from_numpy(np.flatnonzero(np.isin(wishes.owner.numpy(), rows)))
        owner = torch.searchsorted(torch.from_numpy(rows), wishes.owner[own])
        vectors = self.combine(self.model, self.plain(wishes, rows), self.answering(wishes, rows), wishes.prompt[own], wishes.intent[own], owner)
        return vectors @ self.items.T


class Filter:
    """Base, restricted to what all clauses ask for: it knows the categories."""

    def __init__(self, base, categories):
        self.base, self.categories = base, categories.T.contiguous()

    def score(self, wishes, rows):
        scores = self.base.score(wishes, rows)
        for column, intent in enumerate(FORMS[wishes.queries.task]):
            has = self.categories[torch.from_numpy(wishes.queries.category[rows, column])]
            scores.masked_fill_(has if intent == NEGATIVE else ~has, -torch.inf)
        return scores


def whole(wishes, rec):
    """The same wishes as one clause each."""
    intent = torch.full((len(wishes),), FORMS[wishes.queries.task][0])
    return Wishes(wishes.queries, wishes.texts, _vectors(rec, wishes.texts), intent, torch.arange(len(wishes)))


# --- the comparison


class Comparison:
    """Figures of all methods on one part of the data and one way of telling."""

    def __init__(self, rec, evaluator, sets):
        self.rec, self.evaluator, self.sets = rec, evaluator, sets
        model = rec.model
        self.plain = methods.StateTable(evaluator, model, sets)
        self.answering = methods.StateTable(evaluator, model.answering, sets)
        self.found = {}

    def measure(self, name, method, told=lambda wishes: wishes):
        """The metrics of each query, by set, kept under a name."""
        self.found[name] = [self.evaluator.per_query(told(wishes), method.score) for wishes in self.sets]

    def combination(self, combine):
        return Combined(self.rec.model, self.plain, self.answering, combine)

    def mean(self, name, form, metric):
        """Averaged over windows."""
        values = [found[metric].mean().item() for wishes, found in zip(self.sets, self.found[name]) if wishes.queries.task == form]
        return sum(values) / len(values) if values else np.nan

    def p(self, name, other, form):
        users, metric = self.evaluator.sequences.user_of, _METRICS[0]
        return paired_p([
            (users[wishes.queries.position], (a[metric] - b[metric]).numpy())
            for wishes, a, b in zip(self.sets, self.found[name], self.found[other])
            if wishes.queries.task == form
        ])  # fmt: skip

    def baselines(self, categories):
        base = methods.Base(self.plain, self.rec.model.item_matrix())
        self.measure("Base", base)
        self.measure("Filter", Filter(base, categories))
        self.measure("one expert, whole text", self.combination(first_clause), lambda wishes: whole(wishes, self.rec))


def chosen_weights(comparison):
    """The weights by intent with the best mean over the forms, each relative to today's: (positive, negative)."""
    today = {form: comparison.mean(TODAY, form, _METRICS[0]) for form in FORMS}

    def gain(weights):
        comparison.measure("weighted", comparison.combination(additive(weights=weights)))
        return sum(comparison.mean("weighted", form, _METRICS[0]) / value for form, value in today.items() if value > 0)

    return max(product(_WEIGHTS, repeat=2), key=gain)


@torch.no_grad()
def main(folder, settings):
    folder = Path(folder)
    kept = read_yaml(folder / "config.yaml")
    config = make_config(kept.pop("model"), kept.pop("dataset"), (), {**kept, **settings})
    rec = load(folder, prompt_encoder=settings.get("prompt_encoder"))
    sequences = read_sequences(config)
    bank = prepare_queries(config, sequences).bank
    evaluator, categories = Evaluator(sequences, config), torch.from_numpy(sequences.categories)
    weights = None
    for part, title in ((VALID, "validation"), (TEST, "test")):
        sets = query_sets(sequences, config, part)
        told = {
            "two clauses given": [told_as_clauses(queries, rec, bank, part) for queries in sets],
            "one text, through the router": [told_as_text(queries, rec, sequences.category_names) for queries in sets],
        }
        for manner, wishes in told.items():
            comparison = Comparison(rec, evaluator, wishes)
            comparison.baselines(categories)
            for name, combine in COMBINATIONS.items():
                comparison.measure(name, comparison.combination(combine))
            weights = weights or chosen_weights(comparison)
            comparison.found.pop("weighted", None)
            comparison.measure(f"additive, weights {weights[0]:g} and {weights[1]:g}", comparison.combination(additive(weights=weights)))
            _print(comparison, f"{title}, {manner}")


def _print(comparison, title):
    forms = {form: sum(len(w) for w in comparison.sets if w.queries.task == form) for form in FORMS}
    print(f"\n### {title}\n\nQueries: " + ", ".join(f"{form} {n:,}" for form, n in forms.items()) + "\n")
    rows = []
    for name in comparison.found:
        cells = [f"{comparison.mean(name, form, _METRICS[0]):.4f}{_mark(comparison, name, form)}" for form in forms]
        rows.append([name, *cells, *(f"{comparison.mean(name, form, _METRICS[1]):.4f}" for form in forms)])
    head = ["", *(f"{metric} {form}" for metric in _METRICS for form in forms)]
    print(tabulate(rows, headers=head, tablefmt="github", disable_numparse=True))


def _mark(comparison, name, form):
    """Above or below today's way, p < .05."""
    if name == TODAY or not comparison.p(name, TODAY, form) < 0.05:
        return ""
    return " *" if comparison.mean(name, form, _METRICS[0]) > comparison.mean(TODAY, form, _METRICS[0]) else " †"


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        sys.exit(__doc__)
    main(sys.argv[1], parse_settings(sys.argv[2:]))
