"""Softmax cross-entropy over the whole catalogue in chunks of rows: O(chunk x V) memory, one pass.

Legend: N rows, V items, d hidden, s size of the fixed item side, K targets of a row.
"""

import torch

_CHUNK = 256  # rows whose scores over all items are in memory at once; measured best of 128 … 2048 on two cores


def softmax_cross_entropy(state, item, targets, temperature=1.0, side=None, fixed=None, own=None, dtype=None):
    """Cross-entropy with temperature, averaged over a row's targets, then over rows (the paper's loss).

    score(n, i) = (state_n . item_i + side_n . fixed_i) / temperature, but for the item `own.item[n]` the side's
    part is `own.score[n]`.

    Args:
        state: float [N, d], gets a gradient.
        item: float [V, d], gets a gradient; row 0 (padding) is a class like any other, as in RecBole.
        targets: int64 [N] (one target each) or [N, K] padded with negative numbers, at least one each.
        temperature: tau > 0.
        side: float [N, s] or None, gets a gradient.
        fixed: float [V, s] or None, no gradient.
        own: (int64 [N] items, float [N] scores) or None; the scores get a gradient.
        dtype: of the matrix products, default that of `state`; sums and exponentials stay in that of `state`.

    Returns:
        Scalar loss.
    """
    if targets.dim() == 1:
        targets = targets[:, None]
    if side is None:
        side, fixed = state.new_zeros(len(state), 0), state.new_zeros(len(item), 0)
    own_item, own_score = own if own is not None else (None, None)
    return _ChunkedCrossEntropy.apply(state, item, side, own_score, fixed, own_item, targets, temperature, dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient is computed beside the loss, while a chunk's scores are at hand, and scaled in backward."""

    @staticmethod
    def forward(ctx, state, item, side, own_score, fixed, own_item, targets, temperature, dtype):
        n_rows = len(state)
        scale = 1.0 / max(1, n_rows)
        grad_state, grad_item, grad_side = torch.empty_like(state), torch.zeros_like(item), torch.empty_like(side)
        grad_own = None if own_score is None else torch.zeros_like(own_score)
        weights = (targets >= 0).to(state.dtype)
        weights = weights / weights.sum(1, keepdim=True)  # [N, K], rows sum to 1
        target = targets.clamp(min=0)
        total = state.new_zeros((), dtype=torch.float64)
        low = (lambda x: x) if dtype in (None, state.dtype) else (lambda x: x.to(dtype))
        item_low, fixed_low = low(item), low(fixed)
        for start in range(0, n_rows, _CHUNK):
            part = slice(start, start + _CHUNK)
            state_low, side_low = low(state[part]), low(side[part])
            scores = (state_low @ item_low.T).to(state.dtype)  # [n, V]
            if side.shape[1]:
                side_scores = (side_low @ fixed_low.T).to(state.dtype)
                if own_item is not None:
                    side_scores.scatter_(1, own_item[part][:, None], own_score[part][:, None])
                scores += side_scores
            if temperature != 1:
                scores /= temperature
            picked = scores.gather(1, target[part])  # [n, K]
            # softmax in place and with one exp; torch.logsumexp also searches for infinities, a fifth of the step
            highest = scores.amax(1, keepdim=True)
            grad = scores.sub_(highest).exp_()
            normaliser = grad.sum(1, keepdim=True)
            log_sum = (highest + normaliser.log()).squeeze(1)
            total += (log_sum - (weights[part] * picked).sum(1)).sum(dtype=torch.float64)
            grad /= normaliser
            grad.scatter_add_(1, target[part], -weights[part])
            grad *= scale / temperature
            grad_low = low(grad)
            grad_state[part] = grad_low @ item_low
            grad_item += grad_low.T @ state_low
            if side.shape[1]:
                if own_item is not None:
                    column = own_item[part][:, None]
                    grad_own[part] = grad.gather(1, column).squeeze(1)
                    grad_low = low(grad.scatter_(1, column, 0.0))
                grad_side[part] = grad_low @ fixed_low
        ctx.save_for_backward(grad_state, grad_item, grad_side, grad_own)
        return (total * scale).to(state.dtype)

    @staticmethod
    def backward(ctx, grad):
        scaled = [None if g is None else g * grad for g in ctx.saved_tensors]
        return *scaled, None, None, None, None, None
