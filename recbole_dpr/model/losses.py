"""Softmax cross-entropy over the whole catalogue in chunks of rows: O(chunk x V) memory, one pass.

Legend: N rows, V items, d size of the learned vectors, U distinct prompts, K targets of a row.
"""

from dataclasses import dataclass

import torch

_SMALLEST = 1e-38  # a probability below it counts as this
# rows whose scores over all items are in memory at once, and the most scores. Of 128 ... 1024 rows of 3,668 items 512 are the fastest
# on an AMD with 1 MiB of cache a core; an Intel with 2 MiB had 1024 first without text, 512 with it, which has a second such array
_CHUNK, _CHUNK_SCORES = 512, 2**22
_ROWS, _COLUMNS = 64, 32  # what is multiplied in low precision has multiples of them


def in_few_shapes(x):
    """[n, …] with zeros behind: oneDNN makes and keeps a kernel for every shape of a product (see data.loaders)."""
    missing = -len(x) % _ROWS
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def _in_whole_tiles(x):
    """[n, d] with columns of zeros behind: a product over 82 of them takes longer than one over 96."""
    missing = -x.shape[1] % _COLUMNS
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


@dataclass
class TextScores:
    """What the items' text adds to the scores: weight_n x how well prompt n fits the item's text.

    Prompts repeat, and nothing but the weight is learned, so the fit is computed once for each distinct prompt, and its
    gradient not at all.

    Attributes:
        weight: float [M], of the first M of N rows, gets a gradient; the others have no text.
        fit: [U, V] of the type of the products; row: int64 [M], each row's prompt among the U, of which some may be no row's.
        own_item, own_fit: int64 [M], float [M]: the one item whose fit is another.
    """

    weight: torch.Tensor
    fit: torch.Tensor
    row: torch.Tensor
    own_item: torch.Tensor
    own_fit: torch.Tensor


def softmax_cross_entropy(state, item, targets, temperature=1.0, text=None, dtype=None):
    """Cross-entropy with temperature, averaged over a row's targets, then over rows (the paper's loss).

    score(n, i) = (state_n . item_i + text(n, i)) / temperature

    A target of probability below 1e-38 counts as one of 1e-38; gradients are exact all the same.

    Args:
        state: float [N, d], gets a gradient.
        item: float [V, d], gets a gradient; row 0 (padding) is a class like any other, as in RecBole.
        targets: int64 [N] (one target each) or [N, K] padded with negative numbers, at least one each.
        temperature: tau > 0.
        text: TextScores or None.
        dtype: of the matrix products and of what is kept of [N, V] arrays, default that of `state`; sums are taken in that of `state`.

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
        size = state.shape[1]
        grad_state, grad_item = torch.empty_like(state), torch.zeros_like(item)
        grad_weight = None if weight is None else torch.empty_like(weight)
        share = (targets >= 0).to(state.dtype)
        share = share / share.sum(1, keepdim=True)  # [N, K], rows sum to 1
        target = targets.clamp(min=0)
        total = state.new_zeros((), dtype=torch.float64)
        scaled, item_low = state / temperature, _in_whole_tiles(item.to(dtype))
        scaled_low = in_few_shapes(_in_whole_tiles(scaled.to(dtype)))
        # reused by all chunks: fresh memory for each costs as much as some of what is computed in it
        chunk = min(_CHUNK, max(128, _CHUNK_SCORES // len(item)))
        buffer = torch.empty(min(chunk, len(scaled_low)), len(item), dtype=dtype, device=state.device)
        fit_buffer = None if text is None else torch.empty_like(buffer)
        for start in range(0, n_rows, chunk):
            part = slice(start, start + chunk)
            real = len(state[part])
            padded = buffer[: len(scaled_low[part])]
            torch.mm(scaled_low[part], item_low.T, out=padded)  # [n, V]
            chosen = padded[:real]
            n_texts = 0 if text is None else len(weight[part])
            if n_texts:
                fit = torch.index_select(text.fit, 0, text.row[part], out=fit_buffer[:n_texts])
                fit[torch.arange(n_texts, device=fit.device), text.own_item[part]] = text.own_fit[part].to(dtype)
                chosen[:n_texts].addcmul_(fit, (weight[part][:, None] / temperature).to(dtype))
            torch.softmax(chosen, 1, out=chosen)
            at_targets = chosen.gather(1, target[part]).to(state.dtype)  # [n, K]
            total -= (share[part] * at_targets.clamp(min=_SMALLEST).log()).sum(dtype=torch.float64)
            if n_texts:
                of_targets = (share[part][:n_texts] * fit.gather(1, target[part][:n_texts])).sum(1)
                grad_weight[part] = fit.mul_(chosen[:n_texts]).sum(1, dtype=state.dtype) - of_targets
            # the gradient of the scores is `chosen` less the targets' shares, which are seen to after the loop
            grad_state[part] = (padded @ item_low)[:real, :size]
            grad_item += (padded.T @ scaled_low[part])[:, :size]
        grad_state -= (share[:, :, None] * item[target]).sum(1)
        grad_item.index_add_(0, target.reshape(-1), (share[:, :, None] * -scaled[:, None]).reshape(-1, state.shape[1]))
        scale = 1.0 / max(1, n_rows)
        grad_state *= scale / temperature
        grad_item *= scale
        if text is not None:
            grad_weight *= scale / temperature
        ctx.save_for_backward(grad_state, grad_item, grad_weight)
        return (total * scale).to(state.dtype)

    @staticmethod
    def backward(ctx, grad):
        scaled = [None if g is None else g * grad for g in ctx.saved_tensors]
        return *scaled, None, None, None, None
