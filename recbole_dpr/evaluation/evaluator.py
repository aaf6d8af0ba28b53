"""Full-ranking evaluation of any method on query sets, batched, from one encoder pass.

Legend: Q queries, V items, d hidden.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from recbole_dpr import distributed
from recbole_dpr.data.dataset import NO_ITEM
from recbole_dpr.evaluation.metrics import hits_at, ranking_metrics
from recbole_dpr.evaluation.queries import QuerySet, prompts_for
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
        """The backbone's state before each position, float [Q, k] on the model's device."""
        model.eval()
        device = next(model.parameters()).device
        lengths = self.sequences.histories(positions, self.max_length)[1]
        order = np.argsort(lengths)[distributed.rank() :: distributed.world_size()]
        result = torch.zeros(len(positions), model.state_size, device=device)
        batch = max(1, _ENCODED_AT_ONCE // max(1, int(lengths.max(initial=1))))
        for start in tqdm(range(0, len(order), batch), desc="encode histories", disable=not show_progress, leave=False):
            rows = order[start : start + batch]
            item_seq, lengths = map(torch.from_numpy, self.sequences.histories(positions[rows], self.max_length))
            result[torch.from_numpy(rows).to(device)] = model.encode(item_seq.to(device), lengths.to(device))
        return distributed.summed(result)

    @torch.no_grad()
    def per_query(self, prompted, score):
        """Metrics of every query.

        Args:
            prompted: PromptedQueries.
            score: (PromptedQueries, int64 array [B] of its rows) -> float [B, V] scores, free to be overwritten.

        Returns:
            dict "Recall@k" / "NDCG@k" -> float64 [Q].
        """
        queries = prompted.queries
        hits = torch.zeros(len(queries), self.cutoffs[-1], dtype=torch.uint8)
        mine = np.array_split(np.arange(len(queries)), distributed.world_size())[distributed.rank()]
        for start in range(0, len(mine), self.batch_size):
            rows = mine[start : start + self.batch_size]
            scores = score(prompted, rows)
            scores[:, 0] = -torch.inf  # padding
            if self.mask_history:
                seen = self.sequences.seen(queries.position[rows])
                scores[tuple(torch.from_numpy(s).to(scores.device) for s in seen)] = -torch.inf
            targets = torch.from_numpy(queries.targets[rows]).to(scores.device)
            hits[torch.from_numpy(rows)] = hits_at(scores, targets, self.cutoffs[-1]).cpu().to(hits.dtype)
        distributed.summed(hits)
        n_targets = torch.from_numpy((queries.targets != NO_ITEM).sum(axis=1))
        return ranking_metrics(hits.bool(), n_targets, self.cutoffs)

    def row(self, method, prompted, metrics):
        """A row of metrics.json from what `per_query` gave; the queries' own values are kept in `scored`."""
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
