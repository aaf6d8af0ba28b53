"""Ranking metrics are RecBole's own, to the last digit."""

import pytest
import torch
from recbole.evaluator.collector import DataStruct
from recbole.evaluator.metrics import NDCG, Recall

from recbole_dpr.evaluation.metrics import best_items, hits, ranking_metrics

CUTOFFS = [1, 5, 10, 20]


def hits_at(scores, targets, k):
    return hits(best_items(scores, k), targets)


def by_recbole(scores, targets):
    """Metrics of the same scores by recbole.evaluator."""
    config = {"topk": CUTOFFS, "metric_decimal_place": 12}
    positive = torch.zeros_like(scores, dtype=torch.int)
    for row, items in enumerate(targets):
        positive[row, items[items >= 0]] = 1
    best = scores.topk(max(CUTOFFS), dim=1).indices
    struct = DataStruct()
    struct.set("rec.topk", torch.cat([positive.gather(1, best), positive.sum(1, keepdim=True)], dim=1))
    return {**Recall(config).calculate_metric(struct), **NDCG(config).calculate_metric(struct)}


@pytest.mark.parametrize("seed", range(5))
def test_equal_recbole(seed):
    torch.manual_seed(seed)
    scores = torch.randn(200, 60)
    targets = torch.stack([torch.randperm(60)[:25] for _ in range(200)])
    targets[torch.arange(25) >= torch.randint(1, 26, (200, 1))] = -1
    n_targets = (targets >= 0).sum(1)
    found = ranking_metrics(hits_at(scores, targets, 20), n_targets, CUTOFFS)
    for name, value in by_recbole(scores, targets).items():
        ours = found[{"recall": "Recall", "ndcg": "NDCG"}[name.split("@")[0]] + "@" + name.split("@")[1]]
        assert float(ours.mean()) == pytest.approx(value, abs=1e-9)


def test_by_hand():
    """Ranking b, a, d, c with targets a and c: hits at places 2 and 4."""
    scores = torch.tensor([[0.3, 0.4, 0.1, 0.2]])
    found = ranking_metrics(hits_at(scores, torch.tensor([[0, 2]]), 4), torch.tensor([2]), [1, 2, 4])
    assert found["Recall@1"].item() == 0
    assert found["Recall@2"].item() == 0.5
    assert found["NDCG@2"].item() == pytest.approx((1 / 1.5849625) / (1 + 1 / 1.5849625))
    assert found["NDCG@4"].item() == pytest.approx((1 / 1.5849625 + 1 / 2.3219281) / (1 + 1 / 1.5849625))


def test_items_left_out_are_no_hits():
    scores = torch.full((1, 5), -torch.inf)
    scores[0, 1] = 1.0
    assert hits_at(scores, torch.tensor([[3]]), 5).sum() == 0


def test_more_places_than_items():
    hits = hits_at(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[2]]), 10)
    assert hits.shape == (1, 10)
    assert hits[0].tolist() == [False, True] + [False] * 8
