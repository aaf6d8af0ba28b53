"""The states that answers need, and no others: a causal backbone asked for single positions, in evaluation and serving.

Legend: B rows, T steps, d hidden, k size of a state.
"""

import torch
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from recbole_dpr.model.backbones import CausalSASRec


def encode(backbone, item_seq, lengths):
    """`backbone.encode(item_seq, lengths)` within rounding, by the shortest way that this backbone has: [B, k].

    What is exported is RecBole's own forward: torch.export takes the number of requests in this one for fixed.
    """
    shorter = isinstance(backbone, CausalSASRec) and backbone.hidden_act == "gelu" and not backbone.training
    if shorter and not torch.compiler.is_compiling():
        return _sasrec(backbone, item_seq, lengths)
    return backbone.encode(item_seq, lengths)


def _sasrec(model, item_seq, lengths):
    """RecBole's SASRec, whose last layer takes queries from the last position alone: [B, d].

    No mask of the padding is needed below it: what stands right of a history is seen by no position of the history.
    """
    x = model.LayerNorm(model.item_embedding(item_seq) + model.position_embedding.weight[: item_seq.shape[1]])  # [B, T, d]
    *layers, last = model.trm_encoder.layer
    for layer in layers:
        attention = layer.multi_head_attention
        query, key, value = _projected(x, attention.query, attention.key, attention.value)
        attended = scaled_dot_product_attention(*(_heads(y, attention) for y in (query, key, value)), is_causal=True)
        x = _rest_of(layer, x, attended.transpose(1, 2).flatten(2))
    attention = last.multi_head_attention
    asked = x[torch.arange(len(x), device=x.device), lengths - 1]  # [B, d]
    real = torch.arange(item_seq.shape[1], device=x.device) < lengths[:, None]  # [B, T]
    query, (key, value) = attention.query(asked)[:, None], _projected(x, attention.key, attention.value)
    attended = scaled_dot_product_attention(*(_heads(y, attention) for y in (query, key, value)), attn_mask=real[:, None, None])
    return _rest_of(last, asked, attended.flatten(1))


def _projected(x, *layers):
    """What several linear layers make of x, in one product."""
    weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    return linear(x, weight, bias).chunk(len(layers), dim=-1)


def _heads(x, attention):
    """[B, T, d] -> [B, heads, T, d / heads]."""
    return x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)


def _rest_of(layer, x, attended):
    """A transformer layer behind its attention: [..., d]."""
    attention, forward = layer.multi_head_attention, layer.feed_forward
    x = attention.LayerNorm(attention.dense(attended) + x)
    return forward.LayerNorm(forward.dense_2(gelu(forward.dense_1(x))) + x)
