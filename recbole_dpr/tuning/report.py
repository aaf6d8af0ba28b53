"""Trials of a search as tables and a plot, and in words while it runs."""

import csv
import json

from tabulate import tabulate
from tqdm import tqdm

from recbole_dpr.evaluation.report import plt
from recbole_dpr.train.checkpoints import replacing
from recbole_dpr.tuning.trial import PROGRESS, SCORE

_FIXED = ("trial", "score", "stage", "epoch", "seconds")
_LABELLED = 10  # trials that get a name in the plot's legend


def trial_name(trial):
    """`trial_3` of Ray's `4f9a1_00003`."""
    return f"trial_{int(trial.trial_id.rpartition('_')[2])}"


def _number(result):
    return int(result.path.rpartition("_")[2])  # of the folder that `trial_name` has named


def told(folder):
    """What a trial has reported so far, from Ray's record in its folder: list of dicts."""
    path = folder / "result.json"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed writer leaves half a line


def rows(grid, keys):
    """One dict for each trial: its number, best score in the stage it got to, that stage, epochs of it, seconds, values, error.

    Args:
        grid: Ray's ResultGrid; keys: of the search space.
    """
    found = []
    for result in grid:
        metrics = result.metrics or {}
        found.append(
            {
                "trial": _number(result),
                **{"score": metrics.get(SCORE), "stage": metrics.get("stage"), "epoch": metrics.get("epoch")},
                "seconds": round(metrics.get("time_total_s", 0), 1),
                **{key: (result.config or {}).get(key) for key in keys},
                "error": str(result.error).strip().splitlines()[-1] if result.error else "",
            }
        )
    return sorted(found, key=lambda row: row["trial"])


def best_first(found, bigger):
    """The rows with the best one first: scores of one stage compare, and a later stage comes first; failed ones last."""
    scored = [row for row in found if row["score"] is not None and not row["error"]]
    scored.sort(key=lambda row: (row["stage"], row["score"] if bigger else -row["score"]), reverse=True)
    return scored + [row for row in found if row not in scored]


def write(folder, wanted, found, grid, bigger):
    """trials.csv (by number), trials.md (best first) and trials.png."""
    with replacing(folder / "trials.csv") as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    with replacing(folder / "trials.md") as temporary:
        temporary.write_text(table(wanted, found, bigger), encoding="utf-8")
    _plot(folder / "trials.png", wanted, grid)


def table(wanted, found, bigger):
    """The trials as Markdown, the best first."""
    columns = [*_FIXED, *wanted.space, *(["error"] if any(row["error"] for row in found) else [])]
    cells = [["" if row[c] is None else f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in best_first(found, bigger)]
    return (
        f"# Search for {wanted.model} on {wanted.dataset}: {len(found)} trials\n\n"
        f"{tabulate(cells, headers=columns, tablefmt='github', disable_numparse=True)}\n\n"
        "score: best validation score in the stage and after the epochs that the trial got to; scores compare within a stage only.\n"
    )


def _plot(path, wanted, grid):
    """The score of each trial over its epochs, a line for each stage: scores of two stages do not compare."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for result in grid:
        told = result.metrics_dataframe
        if told is None or SCORE not in told:
            continue
        number, colour = _number(result), f"C{_number(result) % 10}"
        for _, stage in told.groupby("stage"):
            axis.plot(stage[PROGRESS], stage[SCORE], marker=".", linewidth=1, color=colour)
        if number < _LABELLED:
            axis.plot([], [], color=colour, label=f"trial {number}")
    for end in range(1, round(axis.get_xlim()[1])):
        axis.axvline(end, color="0.85", zorder=0)
    axis.set(xlabel="stages done", ylabel="best validation score of the stage", title=f"{wanted.model} on {wanted.dataset}")
    axis.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


# --- while it runs


def progress_bar(trials, show):
    return tqdm(total=trials, desc="trials", unit="trial", disable=not show)


def standing(trial, result):
    """Where a running trial is."""
    return f"{trial}: stage {result['stage']} epoch {result['epoch']} score {result[SCORE]:.4f}"


def outcome(trial):
    """Where a trial has ended, and its values."""
    values = "  ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in trial.config.items())
    return f"{standing(trial, trial.last_result)}  {values}" if SCORE in trial.last_result else f"{trial}: no score  {values}"
