"""The strength dial: how far lists follow the prompt, and what that costs in knowing the user.

    python benchmarks/strength.py RUN_FOLDER [--data_path=FOLDER] [--output_dir=FOLDER]

RUN_FOLDER is a finished run of a DPR model. Writes strength.csv and strength.png (default: into RUN_FOLDER), over the
dial and for positive and negative prompts by category:

    fit       share of the top 10 in the category asked for, or outside the one to avoid
    SEQ       NDCG@10 of the next item, where every test user is given the prompt of a category drawn at random (as
              often as items have it): what steering costs when the wish has nothing to do with the next item
    task      NDCG@10 of the POS or NEG task, whose targets comply with the prompt, at the window `valid_window`
"""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from recbole_dpr.cli import parse_settings
from recbole_dpr.config import make_config
from recbole_dpr.data.dataset import TEST
from recbole_dpr.evaluation.evaluator import Evaluator, PromptedQueries
from recbole_dpr.evaluation.queries import prompts_for
from recbole_dpr.materials import prepare_queries, read_sequences
from recbole_dpr.serving.recommender import load
from recbole_dpr.serving.user_tower import UserTower
from recbole_dpr.train.checkpoints import replacing
from recbole_dpr.yamlfile import read_yaml

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 the backend comes first: there may be no screen

STRENGTHS = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 5)
_LABELLED = (0, 0.25, 0.5, 1, 2, 5)
_TOP = 10
_AT_ONCE = 64  # queries: longer batches leave the cache of the processor
_COLUMNS = ("intent", "strength", "fit", "seq_ndcg@10", "task_ndcg@10")


class AtStrength:
    """The model as a method of the evaluation, at one strength.

    Args:
        rec: Recommender; sequences: Sequences; texts: the texts of the prompt table.
    """

    def __init__(self, rec, sequences, texts, strength):
        self.tower, self.rec, self.sequences, self.texts, self.strength = UserTower(rec.model), rec, sequences, texts, strength
        self.items = rec.model.item_vectors()

    def score(self, prompted, rows):
        history = map(torch.from_numpy, self.sequences.histories(prompted.queries.position[rows], self.rec.max_length))
        prompt = torch.from_numpy(self.rec.prompt_vectors([self.texts[row] for row in prompted.prompt[rows]], sentences=True))
        intent = torch.full((len(rows),), prompted.queries.intent)
        strength = torch.full((len(rows),), float(self.strength))
        return self.tower(*history, prompt, intent, strength, torch.arange(len(rows))) @ self.items.T


@torch.no_grad()
def main(folder, settings):
    folder = Path(folder)
    kept = read_yaml(folder / "config.yaml")
    output = Path(settings.pop("output_dir", folder))
    config = make_config(kept.pop("model"), kept.pop("dataset"), (), {**kept, "eval_batch_size": _AT_ONCE, **settings})
    rec = load(folder)
    sequences = read_sequences(config)
    materials = prepare_queries(config, sequences)
    tasks = {p.queries.task: p for p in materials.test if p.kind == "category" and p.queries.window == config["valid_window"]}
    seq = next(p.queries for p in materials.test if p.queries.task == "SEQ")
    arbitrary = {task: _with_random_categories(seq, task, sequences, materials.bank) for task in tasks}
    evaluator, texts, rows = Evaluator(sequences, config), materials.bank.all_texts, []
    for task, strength in tqdm([(task, s) for task in tasks for s in STRENGTHS], desc="strength"):
        method = AtStrength(rec, sequences, texts, strength)
        measured = [evaluator.mean(p, method.score)["NDCG@10"] for p in (arbitrary[task], tasks[task])]
        rows.append([task, strength, _fit(evaluator, arbitrary[task], method), *measured])
    with replacing(output / "strength.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([_COLUMNS, *([*row[:2], *(f"{value:.4f}" for value in row[2:])] for row in rows)])
    _plot(output / "strength.png", rows, tasks["POS"].queries.window)
    print(f"written: {output / 'strength.csv'}, {output / 'strength.png'}")


def _with_random_categories(seq, task, sequences, bank):
    """The SEQ queries with the prompt of a category drawn for each, as often as items have it."""
    _, categories = np.nonzero(sequences.categories)
    drawn = np.random.default_rng(0).choice(categories, len(seq))
    queries = replace(seq, task=task, category=drawn)
    return PromptedQueries(queries, "category", *prompts_for(bank, queries, "category", TEST))


def _fit(evaluator, prompted, method):
    """Share of the top 10 with the category (POS) or without it (NEG)."""
    sequences, queries, shares = evaluator.sequences, prompted.queries, []
    for start in range(0, len(queries), evaluator.batch_size):
        rows = np.arange(start, min(start + evaluator.batch_size, len(queries)))
        scores = method.score(prompted, rows)
        scores[:, 0] = -torch.inf  # padding
        scores[sequences.seen(queries.position[rows])] = -torch.inf
        has = sequences.categories[scores.topk(_TOP).indices, queries.category[rows][:, None]]
        shares.append(has if queries.task == "POS" else ~has)
    return np.concatenate(shares).mean()


def _plot(path, rows, window):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for task, label in (("POS", "positive prompts"), ("NEG", "negative prompts")):
        own = [row for row in rows if row[0] == task]
        left.plot([row[2] for row in own], [row[3] for row in own], marker=".", label=label)
        right.plot([row[1] for row in own], [row[4] for row in own], marker=".", label=f"{task}, window {window}")
        for _, strength, fit, seq, _ in own:
            if strength in _LABELLED:
                left.annotate(f"{strength:g}", (fit, seq), xytext=(4, 3), textcoords="offset points", fontsize=8)
    left.set(xlabel="prompt fit: share of the top 10", ylabel="NDCG@10 of the next item", title="an arbitrary wish; numbers: strength")
    right.set(xlabel="strength", ylabel="NDCG@10 of complying targets", title="the tasks")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        sys.exit(__doc__)
    main(sys.argv[1], parse_settings(sys.argv[2:]))
