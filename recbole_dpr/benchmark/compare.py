"""What finished parts measured, side by side: mean and spread over seeds, and which differences are more than chance.

Legend: Q queries, U users.
"""

import json
from functools import cache

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from recbole_dpr.errors import UserError
from recbole_dpr.model import is_promptable

BASELINE, FULL, OTHER = "baseline", "DPR", "other"  # kinds of rows; other: ablations, single stages, random prompts


def gather(folder, parts):
    """Every figure of the finished parts.

    Args:
        folder: Path of the benchmark; parts: list of Part.

    Returns:
        DataFrame, a row for each figure: label (the table's row), kind, seed, part (its folder), method (its name there),
        task, prompt, window, queries, metric, value.
    """
    rows = []
    for part in parts:
        if not part.finished(folder):
            continue
        for row in read(folder, part)["results"]:
            label, kind = _label(part, row["method"])
            if label is None:
                continue
            own = {"label": label, "kind": kind, "seed": part.seed, "part": part.name, "method": row["method"]}
            where = {key: row[key] for key in ("task", "prompt", "queries")}
            window = "-" if row["window"] is None else str(row["window"])
            rows += [{**own, **where, "window": window, "metric": name, "value": value} for name, value in row["metrics"].items()]
    return pd.DataFrame(rows)


def read(folder, part):
    """metrics.json of a finished part."""
    return json.loads((folder / part.name / "metrics.json").read_text(encoding="utf-8"))


def _label(part, method):
    """The table's row for a method of a part, and its kind; None for what the part shares with the full model's."""
    if not is_promptable(part.model):
        return method, BASELINE
    if part.ablation:
        return (part.label, OTHER) if method == part.model else (None, None)
    if method.startswith(part.model):
        return method, FULL if method == part.model else OTHER
    if method == "Text":  # of no model
        return method, BASELINE
    return f"{method} ({part.model.removeprefix('DPR_')})", BASELINE


def summary(figures, folder, metric):
    """The table: mean and standard deviation over seeds, the best baseline, and how sure a difference to it is.

    Args:
        figures: as from `gather`; folder: Path of the benchmark; metric: the one that per_query.npz has.

    Returns:
        DataFrame, a row for each label, task, prompt, window and metric, in the order of the parts: kind, seeds (how
        many), queries (of all of them), mean, std (NaN for one seed), best_baseline and baseline (the label with the
        highest mean, and that mean), and for full DPR models, on `metric`, p: of a paired t-test against that baseline.
    """
    keys = ["label", "kind", "task", "prompt", "window", "metric"]
    # the same row from parts that share it, such as the text alone, counts once
    each = figures.drop_duplicates(["label", "task", "prompt", "window", "metric", "seed"])
    table = each.groupby(keys, sort=False).agg(seeds=("seed", "size"), queries=("queries", "sum"), mean=("value", "mean"), std=("value", "std"))
    table = table.reset_index()
    column = ["task", "prompt", "window", "metric"]
    baselines = table[table.kind == BASELINE]
    best = baselines.loc[baselines.groupby(column, sort=False)["mean"].idxmax(), [*column, "label", "mean"]]
    table = table.merge(best.rename(columns={"label": "best_baseline", "mean": "baseline"}), on=column, how="left")
    scores = _Scores(folder, each)
    tested = (table.kind == FULL) & (table.metric == metric) & table.best_baseline.notna()
    table["p"] = [
        scores.p(row.label, row.best_baseline, row.task, row.prompt, row.window) if test else np.nan
        for row, test in zip(table.itertuples(), tested)
    ]
    return table


class _Scores:
    """per_query.npz of the parts, by the labels of the table."""

    def __init__(self, folder, figures):
        self.folder = folder
        self.where = {(row.label, row.seed): (row.part, row.method) for row in figures.itertuples()}
        self.windows = figures.loc[figures.window != "avg"].groupby(["task", "prompt"]).window.unique()
        self.load = cache(lambda part: np.load(folder / part / "per_query.npz"))

    def p(self, label, other, task, prompt, window):
        """Of the difference between two labels in a column, over the seeds that both have; NaN where there are none."""
        seeds = [seed for name, seed in self.where if name == label and (other, seed) in self.where]
        windows = self.windows[task, prompt] if window == "avg" else [window]
        return paired_p([self._difference(label, other, seed, f"{task}|{prompt}|{w}") for seed in seeds for w in windows])

    def _difference(self, label, other, seed, queries):
        """Users int [Q] and differences [Q] of the same queries."""
        found = []
        for part, method in (self.where[label, seed], self.where[other, seed]):
            values = self.load(part)
            found.append((values[f"user|{queries}"], values[f"{method}|{queries}"]))
        (users, ours), (same, theirs) = found
        if not np.array_equal(users, same):
            raise UserError(f"{label} and {other} of seed {seed} were measured on other queries; delete one's folder in {self.folder}")
        return users, ours.astype(np.float64) - theirs


def paired_p(differences):
    """Two-sided p of a paired t-test over users, that a figure is the same for two methods.

    The figure is the mean over query sets (windows, seeds) of the mean over a set's queries, as in the table. A user's
    queries hang together, so each user counts once, with what all of them add to the figure's difference.

    Args:
        differences: list of (int [Q] users, float [Q] differences), one for each query set.

    Returns:
        p; NaN without query sets, or if no query differs.
    """
    if not differences:
        return np.nan
    n = 1 + max(users.max() for users, _ in differences)
    added, asked = np.zeros(n), np.zeros(n, dtype=bool)
    for users, difference in differences:
        added += np.bincount(users, difference, n) / len(users)
        asked[users] = True
    if not added.any():
        return np.nan
    return float(ttest_1samp(added[asked], 0).pvalue)
