"""RecBole's layers, computed quicker: the same mathematics, parameters and names in the state dict.

Profiles of RecBole's SASRec on a CPU show most time outside the matrix products: in `bernoulli_`, which draws dropout
masks one number at a time, in a GELU of nine unfused operations, and in masks and scalings of [B, heads, T, T] arrays.

Legend: B rows, T steps, d hidden.
"""

import torch
from recbole.model.layers import FeedForward, MultiHeadAttention
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

_DRAWS = 2**16  # a kept share is rounded to a multiple of 1 / _DRAWS


class Dropout(nn.Dropout):
    """Dropout whose masks come from the bits of whole random words, on the CPU; elsewhere torch's own.

    Draws from torch's default generator, as `torch.nn.Dropout` does, but other numbers.
    """

    def forward(self, x):
        if not self.training or not 0 < self.p < 1 or x.device.type != "cpu":
            return super().forward(x)
        return x * kept(x.shape, self.p, x.dtype)


def kept(shape, p, dtype=torch.float32):
    """What dropout multiplies with: 0 with probability p, else 1 / (1 - p); on the CPU."""
    size = torch.Size(shape).numel()
    words = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), 2**63 - 1)  # four draws in each
    draws = words.view(torch.int16)[:size].view(shape)
    dropped = min(round(p * _DRAWS), _DRAWS - 1)
    mask = torch.empty(shape, dtype=dtype)
    torch.ge(draws, dropped - _DRAWS // 2, out=mask)
    return mask.mul_(_DRAWS / (_DRAWS - dropped))


class CausalAttention(MultiHeadAttention):
    """RecBole's self-attention where a step sees itself and what came before.

    Sequences are left-aligned, so what comes after the last item of one is seen by its padding alone.
    """

    def forward(self, input_tensor, attention_mask):
        """float [B, T, d], float [T, T] to be added to the scores (`causal_mask`) -> [B, T, d]."""
        batch, steps, size = input_tensor.shape
        query, key, value = (self._heads(linear(input_tensor)) for linear in (self.query, self.key, self.value))
        if self.training and self.attn_dropout.p:  # no fused kernel of torch has dropout on the CPU
            query, key, value = (x.reshape(-1, steps, x.shape[-1]) for x in (query, key, value))
            scores = torch.baddbmm(attention_mask, query, key.transpose(1, 2), alpha=1 / self.sqrt_attention_head_size)
            seen = self.attn_dropout(self.softmax(scores)) @ value
            seen = seen.view(batch, self.num_attention_heads, steps, -1)
        else:
            seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = self.out_dropout(self.dense(seen.transpose(1, 2).reshape(batch, steps, size)))
        return self.LayerNorm(hidden + input_tensor)

    def at_end(self, input_tensor, lengths):
        """What `forward` gives at the last step of each sequence, in evaluation: float [B, T, d], int64 [B] -> [B, d]."""
        steps = torch.arange(input_tensor.shape[1], device=lengths.device)
        asking = input_tensor[torch.arange(len(lengths), device=lengths.device), lengths - 1]  # [B, d]
        query, key, value = (self._heads(x) for x in (self.query(asking)[:, None], self.key(input_tensor), self.value(input_tensor)))
        real = steps < lengths[:, None]  # [B, T]
        seen = scaled_dot_product_attention(query, key, value, attn_mask=real[:, None, None])
        return self.LayerNorm(self.dense(seen.flatten(1)) + asking)

    def _heads(self, x):
        """[B, T, d] -> [B, heads, T, d / heads]."""
        return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)


def causal_mask(steps, device):
    """float [T, T]: 0 where a step may look, as little as RecBole's masks have elsewhere."""
    return torch.full((steps, steps), -10000.0, device=device).triu(1)


def quicken(module):
    """Give RecBole's layers in a module their quick forms; parameters, and so checkpoints, stay."""
    for layer in module.modules():
        if type(layer) is nn.Dropout:
            layer.__class__ = Dropout
        elif type(layer) is FeedForward and layer.intermediate_act_fn == layer.gelu:
            layer.intermediate_act_fn = gelu


def make_causal(module):
    """Give RecBole's self-attention in a module its causal form; the mask that it is handed has to be `causal_mask`."""
    for layer in module.modules():
        if type(layer) is MultiHeadAttention:
            layer.__class__ = CausalAttention
