"""Ranking metrics as RecBole defines them, for many queries at once.

Legend: Q queries, K targets of a query, V items, k a cut-off.
"""

import torch

from recbole_dpr.data.dataset import NO_ITEM


def best_items(scores, k):
    """The k best items of every query.

    Args:
        scores: float [Q, V]; items that may not be ranked hold -inf.

    Returns:
        int64 [Q, k], best first, `NO_ITEM` where no item is left.
    """
    best, items = scores.topk(min(k, scores.shape[1]), dim=1)
    items = items.masked_fill_(best == -torch.inf, NO_ITEM)
    return torch.nn.functional.pad(items, (0, k - items.shape[1]), value=NO_ITEM)


def hits(best, targets):
    """Which of the best items are targets.

    Args:
        best: int [Q, k], as from `best_items`.
        targets: int64 [Q, K], padded with `NO_ITEM`.

    Returns:
        bool [Q, k], best first.
    """
    found = torch.zeros(best.shape, dtype=torch.bool, device=best.device)
    for target in targets.T:  # at most as many as the window is wide; [Q, k, K] would be large
        found |= best == target[:, None]
    return found & (best != NO_ITEM)


def ranking_metrics(hits, n_targets, cutoffs):
    """Recall@k and NDCG@k of every query, with the definitions of recbole.evaluator.metrics.

    NDCG normalises by the ideal of min(k, targets) hits at the top.

    Args:
        hits: bool [Q, k_max]; n_targets: int64 [Q], at least 1; cutoffs: list of k <= k_max.

    Returns:
        dict "Recall@k" / "NDCG@k" -> float64 [Q].
    """
    discount = 1 / torch.log2(torch.arange(2, hits.shape[1] + 2, dtype=torch.float64))
    ideal = discount.cumsum(0)
    gains = (hits * discount).cumsum(1)
    found = hits.cumsum(1)
    result = {}
    for k in cutoffs:
        result[f"Recall@{k}"] = found[:, k - 1].double() / n_targets
        result[f"NDCG@{k}"] = gains[:, k - 1] / ideal[n_targets.clamp(max=k) - 1]
    return result
