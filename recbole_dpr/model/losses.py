"""Softmax cross-entropy over the whole catalogue in chunks of rows: O(chunk x V) memory, one pass.

Legend: N rows, V items, d size of the learned vectors, U distinct prompts, K targets of a row.
"""

from dataclasses import dataclass

import torch

_CHUNK = 256  # rows whose scores over all items are in memory at once; measured best of 128 … 2048 on two cores


@dataclass
class TextScores:
    """What the items' text adds to the scores: weight_n x how well prompt n fits the item's text.

    Prompts repeat in a batch, and nothing but the weight is learned, so the fit is computed once for each distinct
    prompt, and its gradient not at all.

    Attributes:
        weight: float [N], gets a gradient.
        fit: [U, V] of any float type; row: int64 [N], each row's prompt among the U.
        own_item, own_fit: int64 [N], float [N]: the one item whose fit is another.
    """

    weight: torch.Tensor
    fit: torch.Tensor
    row: torch.Tensor
    own_item: torch.Tensor
    own_fit: torch.Tensor


def softmax_cross_entropy(state, item, targets, temperature=1.0, text=None, dtype=None):
    """Cross-entropy with temperature, averaged over a row's targets, then over rows (the paper's loss).

    score(n, i) = (state_n . item_i + text(n, i)) / temperature

    Args:
        state: float [N, d], gets a gradient.
        item: float [V, d], gets a gradient; row 0 (padding) is a class like any other, as in RecBole.
        targets: int64 [N] (one target each) or [N, K] padded with negative numbers, at least one each.
        temperature: tau > 0.
        text: TextScores or None.
        dtype: of the matrix products, default that of `state`; sums and exponentials stay in that of `state`.

    Returns:
        Scalar loss.
    """
    if targets.dim() == 1:
        targets = targets[:, None]
    weight = None if text is None else text.weight
    return _ChunkedCrossEntropy.apply(state, item, weight, text, targets, temperature, dtype or state.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient is computed beside the loss, while a chunk's scores are at hand, and scaled in backward."""

    @staticmethod
    def forward(ctx, state, item, weight, text, targets, temperature, dtype):
        n_rows = len(state)
        scale = 1.0 / max(1, n_rows)
        grad_state, grad_item = torch.empty_like(state), torch.zeros_like(item)
        grad_weight = None if weight is None else torch.empty_like(weight)
        share = (targets >= 0).to(state.dtype)
        share = share / share.sum(1, keepdim=True)  # [N, K], rows sum to 1
        target = targets.clamp(min=0)
        total = state.new_zeros((), dtype=torch.float64)
        item_low = item.to(dtype)
        for start in range(0, n_rows, _CHUNK):
            part = slice(start, start + _CHUNK)
            state_low = state[part].to(dtype)
            scores = (state_low @ item_low.T).to(state.dtype)  # [n, V]
            if text is not None:
                fit = text.fit[text.row[part]].to(state.dtype)
                fit.scatter_(1, text.own_item[part][:, None], text.own_fit[part][:, None])
                scores.addcmul_(fit, weight[part][:, None])
            if temperature != 1:
                scores /= temperature
            picked = scores.gather(1, target[part])  # [n, K]
            # softmax in place and with one exp; torch.logsumexp also searches for infinities, a fifth of the step
            highest = scores.amax(1, keepdim=True)
            grad = scores.sub_(highest).exp_()
            normaliser = grad.sum(1, keepdim=True)
            log_sum = (highest + normaliser.log()).squeeze(1)
            total += (log_sum - (share[part] * picked).sum(1)).sum(dtype=torch.float64)
            grad *= (scale / temperature) / normaliser
            grad.scatter_add_(1, target[part], share[part] * (-scale / temperature))
            grad_low = grad.to(dtype)
            grad_state[part] = grad_low @ item_low
            grad_item += grad_low.T @ state_low
            if text is not None:
                grad_weight[part] = torch.linalg.vecdot(grad, fit)
        ctx.save_for_backward(grad_state, grad_item, grad_weight)
        return (total * scale).to(state.dtype)

    @staticmethod
    def backward(ctx, grad):
        scaled = [None if g is None else g * grad for g in ctx.saved_tensors]
        return *scaled, None, None, None, None
