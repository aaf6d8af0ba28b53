"""Results for people: a table beside the paper's figures, and the curves of the training."""

import csv
from collections import defaultdict

import matplotlib
from tabulate import tabulate

from recbole_dpr.evaluation.queries import PROMPT_KINDS
from recbole_dpr.resources import properties_dir
from recbole_dpr.train.checkpoints import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 the backend comes first: there may be no screen

_PAPER_DATASETS = {"ml-1m": "ml-1m", "mind": "MIND"}
_METRICS = ("NDCG@10", "Recall@10")


def averages(results):
    """One row per method, task and prompt, averaged over the windows (each window counts alike).

    Args:
        results: rows as in metrics.json, with integer windows (or None for SEQ).

    Returns:
        list of rows with window "avg"; SEQ is not averaged and not repeated.
    """
    groups = defaultdict(list)
    for row in results:
        if isinstance(row["window"], int):
            groups[row["method"], row["task"], row["prompt"]].append(row)
    return [
        {
            **{"method": method, "task": task, "prompt": prompt, "window": "avg"},
            "queries": sum(row["queries"] for row in rows),
            "metrics": {name: sum(row["metrics"][name] for row in rows) / len(rows) for name in rows[0]["metrics"]},
        }
        for (method, task, prompt), rows in groups.items()
    ]


def paper_figures(dataset, backbone):
    """The paper's figures for a dataset and backbone: (method, task, window or "avg" or None, metric) -> value.

    The paper's method names are ours without blanks, "DPR" being the model's own. Source: arXiv:2602.18929,
    main and detail tables, in properties/paper_results.csv.
    """
    figures = {}
    with open(properties_dir() / "paper_results.csv", encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            if row["dataset"] == _PAPER_DATASETS.get(dataset) and row["backbone"] == backbone:
                window = {"-": None, "avg": "avg"}.get(row["window"]) if row["window"] in ("-", "avg") else int(row["window"])
                figures[row["method"].replace(" ", ""), row["task"], window, row["metric"]] = float(row["value"])
    return figures


def table(result):
    """The Markdown table of a run: methods x tasks and prompts, averaged over windows.

    Args:
        result: the dict of metrics.json.
    """
    model = result["model"]
    paper = paper_figures(result["dataset"], model.removeprefix("DPR_"))
    promptable = model.startswith("DPR_")
    names_in_paper = {model: "DPR"} if promptable else {model: "Base", f"Filter {model}": "Filter"}
    columns = [("SEQ", "none")] + [(task, kind) for task in ("POS", "NEG") for kind in PROMPT_KINDS[task]]
    cells, methods, queries = {}, [], {}
    for row in result["results"]:
        if row["window"] in (None, "avg"):
            cells[row["method"], row["task"], row["prompt"]] = row["metrics"]
            queries[row["task"], row["prompt"]] = row["queries"]
            methods += [] if row["method"] in methods else [row["method"]]
    columns = [column for column in columns if column in queries]
    lines = [f"# {model} on {result['dataset']}", ""]
    stats = result["dataset_stats"]
    lines += [f"{stats['users']:,} users, {stats['items']:,} items, {stats['interactions']:,} interactions; seed {result['seed']}", ""]
    for metric in _METRICS:
        rows = []
        for method in methods:
            values = [cells.get((method, *column), {}).get(metric) for column in columns]
            rows.append([method, *("" if v is None else f"{v:.4f}" for v in values)])
            name = names_in_paper.get(method, method)
            if any(key[0] == name for key in paper):
                rows.append([f"&nbsp;&nbsp;paper: {name}", *(_paper_cell(paper, name, column, metric) for column in columns)])
        head = [metric, *(task if kind == "none" else f"{task} by {kind}" for task, kind in columns)]
        lines += [tabulate(rows, headers=head, tablefmt="github", disable_numparse=True), ""]
    lines += ["Queries: " + ", ".join(f"{t if k == 'none' else f'{t} by {k}'} {queries[t, k]:,}" for t, k in columns), ""]
    lines += ["POS and NEG are averaged over the windows " + ", ".join(map(str, result["protocol"]["windows"])) + "."]
    if paper:
        lines += ["", "Paper: arXiv:2602.18929. Its POS row gives Filter a category and DPR a tag of the target, its own unpublished ones."]
    return "\n".join(lines) + "\n"


def _paper_cell(paper, name, column, metric):
    """The paper's figure where its row means the same: categories for all methods, tags for DPR alone."""
    task, kind = column
    if kind == "wish" or (task != "SEQ" and (kind == "tag") != (name == "DPR")):
        return ""
    value = paper.get((name, task, None if task == "SEQ" else "avg", metric))
    return "" if value is None else f"*{value:.4f}*"


def plot_curves(path, history):
    """Loss and validation metrics over all epochs, stage by stage.

    Args:
        path: PNG file to write; history: list of one dict per epoch with stage (number or name), epoch, loss and metrics.
    """
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    epochs = range(1, len(history) + 1)
    above.set_ylabel("training loss")
    below.set(ylabel="validation NDCG@10", xlabel="epoch")
    names = dict.fromkeys(name for row in history for name in row if name not in ("stage", "epoch", "loss", "score"))
    for stage in dict.fromkeys(row["stage"] for row in history):
        at = [i for i, row in zip(epochs, history) if row["stage"] == stage]
        above.plot(at, [history[i - 1]["loss"] for i in at], marker=".", label=stage if isinstance(stage, str) else f"stage {stage}")
        for axis in (above, below):
            axis.axvline(at[0] - 0.5, color="0.85", zorder=0)
    for name in names:
        at = [i for i, row in zip(epochs, history) if name in row]
        below.plot(at, [history[i - 1][name] for i in at], marker=".", label=name)
    above.legend()
    below.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
