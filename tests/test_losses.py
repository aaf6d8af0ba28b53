"""The chunked cross-entropy equals the plain one, gradients included."""

import pytest
import torch

from recbole_dpr.model import losses

V, D, S, K = 50, 8, 6, 3


def inputs(n, seed=0):
    torch.manual_seed(seed)
    make = lambda *size: torch.randn(*size, dtype=torch.float64, requires_grad=True)  # noqa: E731
    targets = torch.stack([torch.randperm(V)[:K] for _ in range(n)])
    targets[torch.rand(n) < 0.5, 1:] = -1
    return make(n, D), make(V, D), make(n, S), make(n), torch.randn(V, S, dtype=torch.float64), torch.randint(1, V, (n,)), targets


def plain(state, item, side, own_score, fixed, own_item, targets, temperature):
    scores = (state @ item.T + (side @ fixed.T).scatter(1, own_item[:, None], own_score[:, None])) / temperature
    weights = (targets >= 0).double()
    weights = weights / weights.sum(1, keepdim=True)
    return -(scores.log_softmax(1).gather(1, targets.clamp(min=0)) * weights).sum(1).mean()


@pytest.mark.parametrize("n", [1, 255, 256, 257, 700])  # around the chunk size
def test_equals_plain_with_side_and_many_targets(n):
    state, item, side, own_score, fixed, own_item, targets = inputs(n)
    expected = plain(state, item, side, own_score, fixed, own_item, targets, 0.7)
    loss = losses.softmax_cross_entropy(state, item, targets, 0.7, side, fixed, (own_item, own_score))
    wanted = torch.autograd.grad(expected, [state, item, side, own_score])
    found = torch.autograd.grad(3 * loss, [state, item, side, own_score])  # 3: backward scales
    torch.testing.assert_close(loss, expected)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, 3 * b)


def test_equals_torch_cross_entropy_without_side():
    state, item, *_ = inputs(300)
    target = torch.randint(0, V, (300,))
    expected = torch.nn.functional.cross_entropy(state @ item.T, target)
    torch.testing.assert_close(losses.softmax_cross_entropy(state, item, target), expected)


def test_huge_scores_stay_finite():
    state, item, *_ = inputs(10)
    loss = losses.softmax_cross_entropy(1e4 * state, item, torch.randint(0, V, (10,)))
    assert torch.isfinite(loss)


def test_bfloat16_products_point_the_same_way():
    state, item, side, own_score, fixed, own_item, targets = (x.detach().float() if x.is_floating_point() else x for x in inputs(700))
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.clone().requires_grad_() for x in (state, item, side)]
        loss = losses.softmax_cross_entropy(leaves[0], leaves[1], targets, 0.7, leaves[2], fixed, (own_item, own_score), dtype)
        gradients.append((loss, torch.autograd.grad(loss, leaves)))
    (exact, by_float32), (near, by_bfloat16) = gradients
    torch.testing.assert_close(near, exact, rtol=1e-3, atol=0)
    for a, b in zip(by_float32, by_bfloat16):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9995
