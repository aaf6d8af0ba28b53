"""The chunked cross-entropy equals the plain one, gradients included."""

import pytest
import torch

from recbole_dpr.model import losses

V, D, U, K = 50, 8, 6, 3


def inputs(n, seed=0):
    """State, item, text weight; text (fit [U, V], row, own_item, own_fit) of which one row in two is its own item's."""
    torch.manual_seed(seed)
    make = lambda *size: torch.randn(*size, dtype=torch.float64, requires_grad=True)  # noqa: E731
    targets = torch.stack([torch.randperm(V)[:K] for _ in range(n)])
    targets[torch.rand(n) < 0.5, 1:] = -1
    fit_of, own_fit = torch.randn(U, V, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    text = fit_of, torch.randint(0, U, (n,)), torch.randint(1, V, (n,)), own_fit
    return make(n, D), make(V, D), make(n), text, targets


def plain(state, item, weight, text, targets, temperature):
    fit_of, row, own_item, own_fit = text
    fit = fit_of[row].scatter(1, own_item[:, None], own_fit[:, None])
    scores = (state @ item.T + weight[:, None] * fit) / temperature
    weights = (targets >= 0).double()
    weights = weights / weights.sum(1, keepdim=True)
    return -(scores.log_softmax(1).gather(1, targets.clamp(min=0)) * weights).sum(1).mean()


@pytest.mark.parametrize("n", [1, 511, 512, 513, 1100])  # around the chunk size
def test_equals_plain_with_text_and_many_targets(n):
    state, item, weight, text, targets = inputs(n)
    expected = plain(state, item, weight, text, targets, 0.7)
    loss = losses.softmax_cross_entropy(state, item, targets, 0.7, losses.TextScores(weight, *text))
    wanted = torch.autograd.grad(expected, [state, item, weight])
    found = torch.autograd.grad(3 * loss, [state, item, weight])  # 3: backward scales
    torch.testing.assert_close(loss, expected)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, 3 * b)


@pytest.mark.parametrize("n_texts", [1, 512, 600, 699])
def test_text_of_the_first_rows_alone(n_texts):
    """The others are as with a weight of 0."""
    state, item, weight, text, targets = inputs(700)
    expected = plain(state, item, weight * (torch.arange(700) < n_texts), text, targets, 0.7)
    fit, *by_row = text
    loss = losses.softmax_cross_entropy(state, item, targets, 0.7, losses.TextScores(weight[:n_texts], fit, *(x[:n_texts] for x in by_row)))
    for a, b in zip(torch.autograd.grad(loss, [state, item, weight]), torch.autograd.grad(expected, [state, item, weight])):
        torch.testing.assert_close(a, b)


def test_equals_torch_cross_entropy_without_text():
    state, item, *_ = inputs(300)
    target = torch.randint(0, V, (300,))
    expected = torch.nn.functional.cross_entropy(state @ item.T, target)
    torch.testing.assert_close(losses.softmax_cross_entropy(state, item, target), expected)


def test_huge_scores_stay_finite():
    state, item, *_ = inputs(10)
    loss = losses.softmax_cross_entropy(1e4 * state, item, torch.randint(0, V, (10,)))
    assert torch.isfinite(loss)


def test_bfloat16_products_point_the_same_way():
    state, item, weight, text, targets = inputs(700)
    text = [x.float() if x.is_floating_point() else x for x in text]
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.detach().float().requires_grad_() for x in (state, item, weight)]
        text[0] = text[0].to(dtype)
        loss = losses.softmax_cross_entropy(leaves[0], leaves[1], targets, 0.7, losses.TextScores(leaves[2], *text), dtype)
        gradients.append((loss, torch.autograd.grad(loss, leaves)))
    (exact, by_float32), (near, by_bfloat16) = gradients
    torch.testing.assert_close(near, exact, rtol=1e-3, atol=0)
    for a, b in zip(by_float32, by_bfloat16):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9995
