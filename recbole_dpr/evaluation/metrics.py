"""Ranking metrics as RecBole defines them, for many queries at once.

Legend: Q queries, K targets of a query, V items, k a cut-off.
"""

import torch


def hits_at(scores, targets, k):
    """Which of the k best items are targets.

    Args:
        scores: float [Q, V]; items that may not be ranked hold -inf.
        targets: int64 [Q, K], padded with negative numbers.
        k: number of best items.

    Returns:
        bool [Q, k], best first.
    """
    best, items = scores.topk(min(k, scores.shape[1]), dim=1)
    hits = (items[:, :, None] == targets[:, None, :]).any(dim=2)
    hits = hits & (best > -torch.inf)
    return torch.nn.functional.pad(hits, (0, k - hits.shape[1]))


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
