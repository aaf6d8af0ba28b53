"""Do lists follow wishes in people's own words: the share of the top 10 in the categories that a wish means.

    python benchmarks/free_text.py RUN_FOLDER [--wishes=FILE] [--users=1000] [--data_path=FOLDER] [--prompt_encoder=FOLDER]

RUN_FOLDER is a finished run of a DPR model; FILE is a table like dataset/prompts/category_wishes.tsv, the default. Every
wish is asked by the same test users (all, or so many drawn), whose histories end where the test part begins; what they
have seen is left out. A positive wish is met by a film with any of its categories, a negative one is violated by it.

    Base      the share without a prompt
    routed    with the wish as `recommend` takes it: the router finds clauses and intents
    given     with the wish as one clause of the intent that the file gives: the steering alone

Prints Markdown.

Legend: U users, V items, C categories, k length of a list.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

from recbole_dpr.cli import parse_settings
from recbole_dpr.config import make_config
from recbole_dpr.data.dataset import TEST
from recbole_dpr.errors import unknown
from recbole_dpr.evaluation.evaluator import Evaluator
from recbole_dpr.evaluation.queries import evaluated_positions
from recbole_dpr.materials import read_sequences
from recbole_dpr.prompts.intent import Clause, parse_prompt
from recbole_dpr.resources import dataset_dir
from recbole_dpr.serving.recommender import load
from recbole_dpr.serving.user_tower import UserTower
from recbole_dpr.yamlfile import read_yaml

TOP = 10
RARE = 0.2  # of the catalogue: wishes on categories below it are counted apart
STRENGTHS = (1, 1.5, 2)
_WORST = 12  # wishes shown


def read_wishes(path, category_names):
    """The wishes of a file.

    Returns:
        list of (text, intent, bool [C] of the categories that it means).
    """
    with open(path, encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    place = {name: number for number, name in enumerate(category_names)}
    wishes = []
    for row in rows:
        meant = np.zeros(len(place), dtype=bool)
        for name in row["categories"].split("|"):
            if name not in place:
                raise unknown("category", name, category_names)
            meant[place[name]] = True
        wishes.append((row["text"], row["intent"], meant))
    return wishes


class Lists:
    """The lists of all users, with or without a wish.

    Args:
        rec: Recommender; evaluator: Evaluator; positions: int64 [U].
    """

    def __init__(self, rec, evaluator, positions):
        self.rec, self.tower, self.items = rec, UserTower(rec.model), rec.model.item_vectors()
        self.plain, self.answering = (evaluator.states(model, positions) for model in (rec.model, rec.model.answering))
        self.seen = tuple(map(torch.from_numpy, evaluator.sequences.seen(positions)))
        self.resting = rec.model.resting_vectors(self.plain, self.answering) @ self.items.T  # [U, V]

    def unprompted(self):
        """int64 [U, k] items, best first."""
        return self._best(self.rec.model.unprompted_vectors(self.plain) @ self.items.T)

    def top(self, clauses, strengths=STRENGTHS):
        """The same with a wish, for each of some strengths from 1: from there on scores move along a straight line."""
        n = len(self.plain)
        prompt = torch.from_numpy(self.rec.prompt_vectors([clause.text for clause in clauses]))
        intent = torch.tensor([clause.expert for clause in clauses])
        owner = torch.arange(n).repeat(len(clauses))
        each = prompt.repeat_interleave(n, dim=0), intent.repeat_interleave(n), torch.ones(len(owner))
        prompted = self.tower.combined(self.plain, self.answering, *each, owner) @ self.items.T
        return [self._best(torch.lerp(self.resting, prompted, float(strength))) for strength in strengths]

    def _best(self, scores):
        scores[:, 0] = -torch.inf  # padding
        scores[self.seen] = -torch.inf
        return scores.topk(TOP).indices.numpy()


def shares(lists, categories, meant):
    """Of one wish's lists int64 [U, k]: the share of items with any of the categories meant, bool [C]."""
    return categories[lists][..., meant].any(axis=-1).mean()


@torch.no_grad()
def main(folder, settings):
    folder = Path(folder)
    kept = read_yaml(folder / "config.yaml")
    path, n_users = settings.pop("wishes", dataset_dir() / "prompts" / "category_wishes.tsv"), settings.pop("users", 1000)
    config = make_config(kept.pop("model"), kept.pop("dataset"), (), {**kept, **settings})
    rec = load(folder, prompt_encoder=settings.get("prompt_encoder"))
    sequences = read_sequences(config)
    wishes = read_wishes(path, sequences.category_names)
    positions = evaluated_positions(sequences, "first", TEST)
    if len(positions) > n_users:
        positions = np.sort(np.random.default_rng(config["seed"]).choice(positions, n_users, replace=False))
    lists = Lists(rec, Evaluator(sequences, config), positions)
    told = {
        "routed": [parse_prompt(text) for text, _, _ in wishes],
        "given": [[Clause(text, intent)] for text, intent, _ in wishes],
    }
    base = lists.unprompted()
    figures = {"Base": np.array([shares(base, sequences.categories, meant) for _, _, meant in wishes])}
    for manner, prompts in told.items():
        found = np.array([
            [shares(top, sequences.categories, meant) for top in lists.top(clauses)]
            for clauses, (_, _, meant) in zip(tqdm(prompts, desc=manner), wishes)
        ])  # fmt: skip
        figures |= {(manner, strength): found[:, column] for column, strength in enumerate(STRENGTHS)}
    print(f"{len(wishes)} wishes, {len(positions):,} users\n")
    catalogue = np.array([sequences.categories[1:, meant].any(axis=1).mean() for _, _, meant in wishes])
    positive = np.array([intent == "positive" for _, intent, _ in wishes])
    _print_summary(figures, positive, catalogue)
    _print_categories(figures, positive, np.array([meant for _, _, meant in wishes]), sequences)
    _print_worst(figures, positive, wishes, told["routed"], sequences.category_names)


def _print_summary(figures, positive, catalogue):
    rows, base = [], figures["Base"]
    rare = positive & (catalogue < RARE)
    for key in (key for key in figures if key != "Base"):
        now = figures[key]
        ratio = [now[part].mean() / base[part].mean() for part in (rare, positive, ~positive)]
        cells = [f"{now[part].mean():.3f} ({times:.2f} ×)" for part, times in zip((rare, positive), ratio)]
        rows.append([f"{key[0]}, strength {key[1]:g}", *cells, f"{now[~positive].mean():.3f} ({100 * (ratio[2] - 1):+.1f} %)"])
    rows.insert(0, ["Base", *(f"{base[part].mean():.3f}" for part in (rare, positive, ~positive))])
    head = ["share of the top 10", f"fit, categories below {100 * RARE:.0f} % ({rare.sum()} wishes)", f"fit, all positive ({positive.sum()})"]
    print(tabulate(rows, headers=[*head, f"violations, negative ({(~positive).sum()})"], tablefmt="github", disable_numparse=True), "\n")


def _print_categories(figures, positive, meant, sequences):
    """At strength 1: a wish counts in each of its categories."""
    rows, shown = [], ("Base", ("routed", 1), ("given", 1))
    for number, name in enumerate(sequences.category_names):
        cells = [name, f"{sequences.categories[1:, number].mean():.3f}"]
        for part in (positive, ~positive):
            own = part & meant[:, number]
            cells += [own.sum(), *(f"{figures[key][own].mean():.3f}" if own.any() else "" for key in shown)]
        rows.append(cells)
    head = ["", "of the catalogue", "positive", "Base", "routed", "given", "negative", "Base", "routed", "given"]
    print(tabulate(rows, headers=head, tablefmt="github", disable_numparse=True), "\n")


def _print_worst(figures, positive, wishes, routed, names):
    """Of the positive wishes the worst met, of the negative ones the worst violated, end to end."""
    names = np.array(names, dtype=object)
    for part, sign in ((positive, 1), (~positive, -1)):
        order = np.flatnonzero(part)[np.argsort(sign * figures["routed", 1][part], kind="stable")][:_WORST]
        rows = [
            [wishes[i][0], "|".join(names[wishes[i][2]]), "; ".join(f"{c.text} ({c.intent})" for c in routed[i])]
            + [f"{figures[key][i]:.3f}" for key in ("Base", ("routed", 1), ("given", 1))]
            for i in order
        ]
        head = ["met worst" if sign == 1 else "violated most", "categories", "router", "Base", "routed", "given"]
        print(tabulate(rows, headers=head, tablefmt="github", disable_numparse=True), "\n")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        sys.exit(__doc__)
    main(sys.argv[1], parse_settings(sys.argv[2:]))
