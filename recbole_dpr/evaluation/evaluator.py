"""Full-ranking evaluation of any method on query sets, batched, from one encoder pass.

Legend: Q queries, V items, d hidden.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from recbole_dpr import distributed
from recbole_dpr.data.dataset import NO_ITEM, ranges_of
from recbole_dpr.data.loaders import in_few_widths
from recbole_dpr.evaluation.metrics import best_items, hits, ranking_metrics
from recbole_dpr.evaluation.queries import QuerySet, prompts_for
from recbole_dpr.model.backbones import AllPositions
from recbole_dpr.prompts.bank import NO_PROMPT


# positions of a batch of histories: what stays in the processor's cache; 4 times as fast as 1,024 rows of 200
_ENCODED_AT_ONCE = 6400


@dataclass(frozen=True, eq=False)
class PromptedQueries:
    """A query set with one kind of prompt.

    Attributes:
        queries: QuerySet.
        kind: none, category, tag or wish.
        prompt: int64 [Q] rows of the prompt table (0 for kind none).
        own_phrase: int64 [Q] rows of the training phrases that the prompts repeat, or `NO_PROMPT`.
    """

    queries: QuerySet
    kind: str
    prompt: np.ndarray
    own_phrase: np.ndarray

    @property
    def name(self):
        """As in the key valid_tasks: SEQ, POS/category, …"""
        return self.queries.task if self.kind == "none" else f"{self.queries.task}/{self.kind}"

    def __len__(self):
        return len(self.queries)


def with_prompts(query_sets, bank, part, kinds, tag_form="template"):
    """Every query set with each kind of prompt that its items have; empty ones are left out.

    Args:
        kinds: dict task -> prompt kinds, as `queries.PROMPT_KINDS`; tag_form: as for `queries.prompts_for`.
    """
    result = []
    for queries in query_sets:
        for kind in kinds[queries.task]:
            if kind == "none":
                nothing = np.full(len(queries), NO_PROMPT)
                result.append(PromptedQueries(queries, kind, np.zeros(len(queries), dtype=np.int64), nothing))
                continue
            prompt, own = prompts_for(bank, queries, kind, part, tag_form)
            rows = np.flatnonzero(prompt != NO_PROMPT)
            if len(rows):
                result.append(PromptedQueries(queries.take(rows), kind, prompt[rows], own[rows]))
    return result


class Evaluator:
    """Ranks all items for queries and measures where the targets land.

    Args:
        sequences: Sequences.
        config: the keys topk, mask_history, eval_batch_size, MAX_ITEM_LIST_LENGTH, valid_metric.

    Attributes:
        scored: dict of arrays [Q], what goes into per_query.npz: "method|task|prompt|window" -> float32, the
            valid_metric of every query; "user|task|prompt|window" -> int32, whose queries these are. The window of
            SEQ is "-".
    """

    def __init__(self, sequences, config):
        self.sequences = sequences
        self.cutoffs = sorted(config["topk"])
        self.mask_history, self.batch_size = config["mask_history"], config["eval_batch_size"]
        self.max_length, self.metric = config["MAX_ITEM_LIST_LENGTH"], config["valid_metric"]
        self.scored = {}

    @torch.no_grad()
    def states(self, model, positions, show_progress=False):
        """The backbone's state before each position, float [Q, k] on the model's device.

        Of a backbone that gives the states of a whole sequence, positions whose histories begin with the same item, which
        are prefixes of one another, share a pass.
        """
        model.eval()
        device = next(model.parameters()).device
        lengths = self.sequences.history_lengths(positions, self.max_length)
        passes = positions - lengths if isinstance(model, AllPositions) else positions
        order = np.lexsort((positions, passes))
        first = np.flatnonzero(np.diff(passes[order], prepend=-1))  # of each pass in `order`; its last history is the longest
        count = np.diff(np.append(first, len(order)))
        longest = order[first + count - 1]
        result = torch.zeros(len(positions), model.state_size, device=device)
        at_once = max(1, _ENCODED_AT_ONCE // max(1, int(lengths.max(initial=1))))
        bar = tqdm(total=len(first), desc="encode histories", disable=not show_progress, leave=False)
        for several in (False, True):
            mine = np.flatnonzero((count > 1) == several)
            mine = mine[np.argsort(lengths[longest[mine]], kind="stable")][distributed.rank() :: distributed.world_size()]
            for start in range(0, len(mine), at_once):
                block = mine[start : start + at_once]
                item_seq, ends = self.sequences.histories(positions[longest[block]], self.max_length)
                item_seq = torch.from_numpy(in_few_widths(item_seq, self.max_length)).to(device)
                if several:
                    sequence, rows = map(torch.from_numpy, ranges_of(first[block], count[block], order))
                    states = model.states(item_seq)[sequence.to(device), torch.from_numpy(lengths).to(device)[rows.to(device)] - 1]
                else:
                    rows = torch.from_numpy(longest[block])
                    states = model.encode(item_seq, torch.from_numpy(ends).to(device))
                result[rows.to(device)] = states
                bar.update(len(block))
        bar.close()
        return distributed.summed(result)

    def metrics(self, method, sets):
        """Metrics of every query of several sets; rankings that come out the same are made once.

        Args:
            method: one of evaluation.methods; sets: list of PromptedQueries.

        Returns:
            list of dicts "Recall@k" / "NDCG@k" -> float64 [Q], one per set.
        """
        return self._metrics(sets, method.score, np.concatenate([method.depends_on(prompted) for prompted in sets]))

    def per_query(self, prompted, score):
        """Metrics of every query.

        Args:
            prompted: PromptedQueries.
            score: (PromptedQueries, int64 array [B] of its rows) -> float [B, V] scores, free to be overwritten.

        Returns:
            dict "Recall@k" / "NDCG@k" -> float64 [Q].
        """
        return self._metrics([prompted], score, np.arange(len(prompted))[:, None])[0]

    @torch.no_grad()
    def _metrics(self, sets, score, depends_on):
        """As `metrics`; depends_on: int64 [Q, n], what the rankings of all queries of the sets depend on."""
        representative, ranking_of = _distinct(depends_on)
        ends = np.cumsum([len(prompted) for prompted in sets])
        best = torch.zeros(len(representative), self.cutoffs[-1], dtype=torch.int32)
        for prompted, end in zip(sets, ends):
            start = end - len(prompted)
            own = np.flatnonzero((representative >= start) & (representative < end))
            own = np.array_split(own, distributed.world_size())[distributed.rank()]
            for block in range(0, len(own), self.batch_size):
                rankings = own[block : block + self.batch_size]
                best[torch.from_numpy(rankings)] = self._best(prompted, representative[rankings] - start, score)
        distributed.summed(best)
        result = []
        for prompted, rows in zip(sets, np.split(ranking_of, ends[:-1])):
            targets = torch.from_numpy(prompted.queries.targets)
            found = hits(best[torch.from_numpy(rows)], targets)
            result.append(ranking_metrics(found, (targets != NO_ITEM).sum(1), self.cutoffs))
        return result

    def _best(self, prompted, rows, score):
        """The best items of these rows: int32 [B, k]."""
        scores = score(prompted, rows).contiguous()
        scores[:, 0] = -torch.inf  # padding
        if self.mask_history:
            row, item = self.sequences.seen(prompted.queries.position[rows])
            scores.view(-1)[torch.from_numpy(row * scores.shape[1] + item).to(scores.device)] = -torch.inf
        return best_items(scores, self.cutoffs[-1]).int().cpu()

    def rows(self, label, method, sets):
        """Rows of metrics.json of a method on several sets; the queries' own values are kept in `scored`."""
        return [self._row(label, prompted, metrics) for prompted, metrics in zip(sets, self.metrics(method, sets))]

    def _row(self, method, prompted, metrics):
        queries = prompted.queries
        where = f"{queries.task}|{prompted.kind}|{queries.window or '-'}"
        if self.metric in metrics:  # RecBole's models may be validated on one that is none of ours
            self.scored[f"{method}|{where}"] = metrics[self.metric].numpy().astype(np.float32)
            self.scored[f"user|{where}"] = self.sequences.user_of[queries.position].astype(np.int32)
        return {
            **{"method": method, "task": queries.task, "prompt": prompted.kind, "window": queries.window},
            **{"queries": len(prompted), "metrics": {name: float(values.mean()) for name, values in metrics.items()}},
        }

    def mean(self, prompted, score):
        """Metrics averaged over the queries: dict of floats."""
        return {name: float(values.mean()) for name, values in self.per_query(prompted, score).items()}


def _distinct(rows):
    """The distinct rows of an int array [Q, n], in their order.

    Returns:
        first: int64 [U], where each occurs first; which: int64 [Q], the one that each row is.
    """
    order = np.lexsort(rows.T[::-1])
    new = np.append(True, (np.diff(rows[order], axis=0) != 0).any(axis=1))[: len(order)]
    which = np.empty(len(order), dtype=np.int64)
    which[order] = np.cumsum(new) - 1
    return order[new], which
