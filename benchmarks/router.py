"""How well prompts are split into clauses and told apart, wanted from avoided: a table of routers on the held-out corpora.

    python benchmarks/router.py [--routers=cues,tagger,nli] [--styles=True] [--errors=NAME]

--styles=True adds a table by style; --errors=intents_heldout2 lists what the last router got wrong in that file. Prints
Markdown. `nli` needs facebook/bart-large-mnli on this machine.

The measures were fixed before any router was trained. Words are compared in lower case, without punctuation.
(a) Over texts with ONE reference clause. **intent**: the router gives at least one clause, all of them of the reference's
    intent, and a word of theirs is one of the reference's. **exact**: they hold, joined, exactly the reference's words.
(b) Over texts with TWO reference clauses OR MORE, neighbours of one intent joined on both sides. **split**: the intents are
    the same in the same order, and each joined clause has an F1 over words of at least 0.5 with its counterpart.
    **exact**: each has exactly its counterpart's words.
**clauses**: over all reference clauses of all texts, the share of which more words stand in clauses of the right intent than
    in those of the wrong one, and at least one does.
"""

import csv
import re
import sys
import time
from collections import Counter
from itertools import groupby
from statistics import median

import torch
from tabulate import tabulate

from recbole_dpr.cli import parse_settings
from recbole_dpr.errors import UserError
from recbole_dpr.prompts.intent import Clause, router
from recbole_dpr.resources import dataset_dir

_HELD_OUT = ("intents_heldout", *(f"intents_heldout{number}" for number in range(2, 8)))
_ENOUGH = 0.5  # F1 over words of a clause that counts as found
_TIMED, _WARM_UP = 200, 10
MEASURES = ("intent", "exact", "split", "split exact", "clauses")


def read(name, folder="prompts"):
    """[(text, [Clause, …], style, domain), …] of a corpus in a folder of dataset/."""
    with open(dataset_dir() / folder / f"{name}.tsv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(row["text"], [Clause(*part.split("||")) for part in row["clauses"].split(" ## ")], row["style"], row.get("domain", "films")) for row in rows]


def judge(reference, found):
    """{measure: [bool, …]} of one text; a measure that does not concern it has none."""
    verdicts = {"clauses": [_told(clause, found) for clause in reference]}
    intents, (wanted, own) = {clause.intent for clause in found}, (_joined(reference), _joined(found))
    if len(reference) == 1:
        verdicts["intent"] = [intents == {reference[0].intent} and bool(set(wanted[0][1]) & {w for _, words in own for w in words})]
        verdicts["exact"] = [wanted == own]
    else:
        same = [intent for intent, _ in wanted] == [intent for intent, _ in own]
        verdicts["split"] = [same and all(_f1(a, b) >= _ENOUGH for (_, a), (_, b) in zip(wanted, own))]
        verdicts["split exact"] = [wanted == own]
    return verdicts


def scores(judged):
    """{measure: share} over the verdicts of several texts."""
    pooled = {measure: [right for verdicts in judged for right in verdicts.get(measure, [])] for measure in MEASURES}
    return {measure: sum(rights) / len(rights) if rights else None for measure, rights in pooled.items()}


def _words(text):
    return re.findall(r"[^\W_]+", text.lower())


def _joined(clauses):
    """[(intent, words), …], neighbours of one intent as one."""
    return [(intent, [w for clause in group for w in _words(clause.text)]) for intent, group in groupby(clauses, lambda clause: clause.intent)]


def _f1(a, b):
    return 2 * (Counter(a) & Counter(b)).total() / max(len(a) + len(b), 1)


def _told(clause, found):
    """Whether a clause's words stand in found clauses of its intent rather than in others."""
    shared = {True: 0, False: 0}
    for other in found:
        shared[other.intent == clause.intent] += (Counter(_words(clause.text)) & Counter(_words(other.text))).total()
    return shared[True] > shared[False]


def main(routers="cues,tagger,nli", styles=False, errors=None):
    corpora, columns, judged = {name: read(name) for name in _HELD_OUT}, {}, {}
    for name in routers.split(","):
        try:
            route = router(name)
        except UserError as error:
            print(f"{name}: left out, {error}\n")
            continue
        columns[name] = route
        judged[name] = {corpus: [judge(clauses, route(text)) for text, clauses, *_ in rows] for corpus, rows in corpora.items()}
    for corpus, rows in corpora.items():
        counts = Counter(len(clauses) > 1 for _, clauses, *_ in rows)
        print(f"**{corpus}**: {counts[False]} texts of one clause (intent, exact), {counts[True]} of several (split)\n")
        table = [[name, *_shown(scores(judged[name][corpus])), f"{1000 * _latency(columns[name], rows):.1f}"] for name in columns]
        print(tabulate(table, headers=["router", *MEASURES, "ms"], tablefmt="github", disable_numparse=True), "\n")
    last = list(columns)[-1]
    if styles:
        table = []
        for corpus, rows in corpora.items():
            by_style = sorted(zip((row[2] for row in rows), judged[last][corpus]), key=lambda pair: pair[0])
            table += [[style, *_shown(scores([own for _, own in group]))] for style, group in groupby(by_style, lambda pair: pair[0])]
        print(tabulate(table, headers=[f"style, {last}", *MEASURES], tablefmt="github", disable_numparse=True), "\n")
    if errors:
        for (text, clauses, style, _), verdicts in zip(corpora[errors], judged[last][errors]):
            if not all(verdicts.get("intent", []) + verdicts.get("split", [])):
                print(f"- {style}: {text}\n  - meant: {_listed(clauses)}\n  - found: {_listed(columns[last](text))}")


def _shown(found):
    return ["" if found[measure] is None else f"{100 * found[measure]:.1f}" for measure in MEASURES]


def _listed(clauses):
    return "; ".join(f"{'+' if clause.intent == 'positive' else '−'} {clause.text}" for clause in clauses)


def _latency(route, rows):
    """Median seconds of the processor for a prompt, one after the other on one thread, each a new one."""
    seconds = []
    for text, *_ in rows[: _TIMED + _WARM_UP]:
        start = time.process_time()  # of this process alone, whatever else the machine does
        route(text)
        seconds.append(time.process_time() - start)
    return median(seconds[_WARM_UP:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(**parse_settings(sys.argv[1:], ("routers", "errors")))
