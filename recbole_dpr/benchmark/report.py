"""table.md, table.csv and figure.png of a benchmark, from what has ended so far."""

import numpy as np
from tabulate import tabulate

from recbole_dpr.benchmark.compare import BASELINE, FULL, gather, read, summary
from recbole_dpr.evaluation.queries import PROMPT_KINDS
from recbole_dpr.evaluation.report import plt
from recbole_dpr.model import is_promptable
from recbole_dpr.train.checkpoints import replacing

_LEVEL = 0.05  # of p, for a mark
_COLUMNS = [("SEQ", "none")] + [(task, kind) for task in ("POS", "NEG") for kind in PROMPT_KINDS[task]]
_FIGURE_METRIC = "NDCG@10"


def write(folder, dataset, parts, failed, metric, command):
    """Write the three files, each whole or not at all; nothing as long as no part has ended.

    Args:
        folder: Path; parts: list of Part; failed: dict Part -> why it could not be run.
        metric: valid_metric, on which differences are tested; command: the command line, or None.
    """
    done = [part for part in parts if part.finished(folder)]
    if not done:
        return
    table = summary(gather(folder, done), folder, metric)
    with replacing(folder / "table.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    _plot(folder / "figure.png", table)
    labels = list(dict.fromkeys([*table.label, *(part.label for part in failed)]))
    metrics = list(dict.fromkeys([metric, "NDCG@10", "Recall@10"]))
    seeds = len({part.seed for part in parts})
    blocks = [_head(folder, dataset, parts, done, command)]
    for name in metrics:
        chosen = table[(table.metric == name) & table.window.isin(["-", "avg"])]
        if len(chosen):
            blocks.append(_markdown(chosen, name, labels, seeds, name == metric))
    blocks += [_legend(table, metric, seeds), _runs(folder, parts, failed)]
    with replacing(folder / "table.md") as temporary:
        temporary.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def _head(folder, dataset, parts, done, command):
    results = [read(folder, part) for part in done]
    stats = results[0]["dataset_stats"]
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(part.seed for part in parts))
    lines = [f"# Benchmark on {dataset}"] + ([f"`{command}`"] if command else [])
    lines.append(
        ", ".join(f"{value:,} {name}" for name, value in stats.items())
        + f"; seed{'s' if ',' in seeds else ''} {seeds}; {len(done)} of {len(parts)} runs have ended, "
        + f"in {sum(sum(r['seconds'].values()) for r in results) / 60:.1f} minutes"
    )
    versions = dict.fromkeys(", ".join(f"{name} {version}" for name, version in r["versions"].items()) for r in results)
    return "\n\n".join([*lines, f"{'; '.join(dict.fromkeys(r['machine'] for r in results))}; {'; or '.join(versions)}"])


def _markdown(table, metric, labels, seeds, marked):
    """Methods x tasks of one metric; the best baseline of each column, which marks refer to, below.

    Args:
        table: rows of `compare.summary`, one for each cell; labels: all rows, those of failed parts among them.
        seeds: how many there should be; marked: whether the differences were tested on this metric.
    """
    columns = [c for c in _COLUMNS if ((table.task == c[0]) & (table.prompt == c[1])).any()]
    cells = {(row.label, row.task, row.prompt): row for row in table.itertuples()}
    about = table.drop_duplicates("label").set_index("label")
    rows = []
    for label in labels:
        if label not in about.index:
            rows.append([label, "not run"])
            continue
        kind, n = about.loc[label, ["kind", "seeds"]]
        name = f"**{label}**" if kind == FULL else label
        name += f" ({n} of {seeds} seeds)" if n < seeds else ""
        rows.append([name, *(_cell(cells.get((label, *column)), marked) for column in columns)])
    best = {(row.task, row.prompt): row.best_baseline for row in table.itertuples() if isinstance(row.best_baseline, str)}
    rows.append(["*best baseline*", *(best.get(column, "") for column in columns)])
    head = [metric, *(task if kind == "none" else f"{task} by {kind}" for task, kind in columns)]
    return tabulate(rows, headers=head, tablefmt="github", disable_numparse=True)


def _cell(row, marked):
    if row is None:
        return ""
    spread = "" if np.isnan(row.std) else f" ± {row.std:.4f}"
    mark = ""
    if marked and row.p < _LEVEL:
        mark = " *" if row.mean > row.baseline else " †"
    return f"{row.mean:.4f}{spread}{mark}"


def _legend(table, metric, seeds):
    windows = ", ".join(dict.fromkeys(w for w in table.window if w not in ("-", "avg")))
    kinds, labels = set(table.kind), set(table.label)
    lines = [f"POS and NEG are averaged over the windows {windows}; table.csv has each of them, and every metric."]
    if seeds > 1:
        lines.append(f"Mean ± standard deviation over {seeds} seeds; each seed draws an evaluation set of its own, the same for all methods.")
    if FULL in kinds and BASELINE in kinds:
        lines.append(
            f"\\* above, † below the best baseline of the column (last row) with p < {_LEVEL}: paired t-test over users on {metric}, "
            "two-sided, not corrected for the number of comparisons. The best baseline is chosen on these very figures."
        )
    if any(label.startswith("Base (") for label in labels):
        lines.append(
            "A name in brackets is the backbone of a DPR model: Base is its stage 1, trained by our recipe; +f fine-tuned on next "
            "items, +f+a on the targets of DPR without the prompts; Base+text, Base+likelihood and CTRL-Rec add what the items' "
            "text says of the prompt, with a weight tuned on validation. Text is that text alone."
        )
    if any(label.startswith("Filter") for label in labels):
        lines.append("Filter is told the category that the prompt means, and ranks the items with it (POS) or without it (NEG).")
    if any(label.endswith("/rand") for label in labels):
        lines.append("/rand: the same model, with random vectors in place of the prompts.")
    return "\n\n".join(lines)


def _runs(folder, parts, failed):
    """What each run took and how its training ended."""
    rows = []
    for part in parts:
        if part.finished(folder):
            result = read(folder, part)
            rows.append([part.name, _training(part, result), f"{sum(result['seconds'].values()):.0f}"])
        elif part in failed:
            rows.append([part.name, f"not run: {failed[part]}".replace("|", "\\|"), ""])
        else:
            rows.append([part.name, "not yet run", ""])
    table = tabulate(rows, headers=["run", "epochs", "seconds"], tablefmt="github", disable_numparse=True)
    return f"{table}\n\nSeconds are of the last sitting, where a run was interrupted."


def _training(part, result):
    if is_promptable(part.model):
        epochs = {}
        for row in result["history"]:
            epochs[row["stage"]] = epochs.get(row["stage"], 0) + 1
        return ", ".join(f"{stage if isinstance(stage, str) else f'stage {stage}'}: {n}" for stage, n in epochs.items())
    training = result["training"]
    if training is None:
        return "learns without epochs"
    how = "early stopping" if training["stopped_early"] else "the cap, early stopping had not fired"
    return f"{training['epochs']} of at most {training['cap']}: {how}"


def _plot(path, table):
    """POS and NEG by method, one panel for each window."""
    table = table[(table.metric == _FIGURE_METRIC) & table.task.isin(["POS", "NEG"]) & ~table.window.isin(["-", "avg"])]
    labels, windows = list(dict.fromkeys(table.label)), list(dict.fromkeys(table.window))
    if not labels:
        return
    figure, panels = plt.subplots(
        1, len(windows), sharey=True, squeeze=False, figsize=(3 + 3.2 * len(windows), 1.5 + 0.2 * len(labels)), layout="constrained"
    )
    colours = {"category": "tab:blue", "tag": "tab:orange", "wish": "tab:green"}
    for panel, window in zip(panels[0], windows):
        for (task, prompt), group in table[table.window == window].groupby(["task", "prompt"], sort=False):
            style = {"color": colours[prompt], "marker": "o" if task == "POS" else "x", "linestyle": ""}
            panel.errorbar(group["mean"], [labels.index(label) for label in group.label], xerr=group["std"].fillna(0), label=f"{task} by {prompt}", **style)
        panel.set(title=f"window {window}", xlabel=_FIGURE_METRIC)
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
    panels[0][0].set_yticks(range(len(labels)), labels, fontsize="small")
    panels[0][0].set_ylim(len(labels) - 0.5, -0.5)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
