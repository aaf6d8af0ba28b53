"""Two SASRecs on the same histories in one pass, for requests.

With `decouple_backbone` a prompted request asks the unprompted backbone and that of prompted requests for the state after
one history. At a single history most of a pass is calling operations, not computing in them, so each operation here does
both backbones' work.

Legend: B histories, T steps, d hidden, H heads; a leading 2 is for the two backbones.
"""

import torch
from torch.nn.functional import layer_norm, scaled_dot_product_attention


class PairedSASRec:
    """`encode` of two `CausalSASRec` of one shape, as their weights are now.

    Args:
        models: the two, in evaluation mode.
    """

    def __init__(self, models):
        self._items = torch.stack([model.item_embedding.weight.detach() for model in models])  # [2, V, d]
        self._positions = torch.stack([model.position_embedding.weight.detach() for model in models])[:, None]  # [2, 1, L, d]
        self._norm = _Norm([model.LayerNorm for model in models])
        self._layers = [_Layer(pair) for pair in zip(*(model.trm_encoder.layer for model in models))]

    def __call__(self, item_seq, lengths):
        """int64 [B, T], left-aligned, int64 [B] -> states [2, B, d]."""
        B, T = item_seq.shape
        x = self._items[:, item_seq.reshape(-1)].view(2, B, T, -1) + self._positions[:, :, :T]
        x = self._norm(x.flatten(1, 2))  # [2, B * T, d]
        *layers, last = self._layers
        for layer in layers:
            x = layer(x, B)
        return last.at_end(x, B, lengths)


class _Layer:
    """A pair of RecBole's TransformerLayers; [2, B * T, d] -> the same."""

    def __init__(self, pair):
        attentions, forwards = [layer.multi_head_attention for layer in pair], [layer.feed_forward for layer in pair]
        self._heads = attentions[0].num_attention_heads
        self._query, self._key, self._value, self._dense = (
            _Linear([getattr(attention, name) for attention in attentions]) for name in ("query", "key", "value", "dense")
        )
        self._all = _Linear.side_by_side([self._query, self._key, self._value])
        self._attention_norm, self._norm = (_Norm([part.LayerNorm for part in parts]) for parts in (attentions, forwards))
        self._wide, self._narrow = (_Linear([getattr(part, name) for part in forwards]) for name in ("dense_1", "dense_2"))
        self._activation = forwards[0].intermediate_act_fn

    def __call__(self, x, batch):
        query, key, value = (self._in_heads(part, batch) for part in self._all(x).chunk(3, dim=2))
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)  # [2 B, H, T, d / H]
        return self._rest(seen.transpose(1, 2).reshape(x.shape), x)

    def at_end(self, x, batch, lengths):
        """At the last step of each history alone: [2, B, d]."""
        steps = x.shape[1] // batch
        asking = x[:, torch.arange(batch, device=x.device) * steps + lengths - 1]
        query, key, value = (self._in_heads(part, batch) for part in (self._query(asking), self._key(x), self._value(x)))
        real = (torch.arange(steps, device=x.device) < lengths[:, None]).repeat(2, 1)[:, None, None]
        seen = scaled_dot_product_attention(query, key, value, attn_mask=real)  # [2 B, H, 1, d / H]
        return self._rest(seen.reshape(asking.shape), asking)

    def _rest(self, seen, x):
        x = self._attention_norm(self._dense(seen) + x)
        return self._norm(self._narrow(self._activation(self._wide(x))) + x)

    def _in_heads(self, x, batch):
        """[2, B * T, d] -> [2 B, H, T, d / H]."""
        return x.unflatten(1, (batch, -1)).flatten(0, 1).unflatten(2, (self._heads, -1)).transpose(1, 2)


class _Linear:
    """A pair of linear layers: [2, n, in] -> [2, n, out]."""

    def __init__(self, pair):
        self.weight = torch.stack([layer.weight.detach().T for layer in pair])  # [2, in, out]
        self.bias = torch.stack([layer.bias.detach() for layer in pair])[:, None]  # [2, 1, out]

    @classmethod
    def side_by_side(cls, several):
        """One with the outputs of several, one behind the other."""
        joined = cls.__new__(cls)
        joined.weight, joined.bias = (torch.cat([getattr(one, name) for one in several], dim=2) for name in ("weight", "bias"))
        return joined

    def __call__(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class _Norm:
    """A pair of layer norms of [2, n, d]."""

    def __init__(self, pair):
        self._eps = pair[0].eps
        self._weight, self._bias = (torch.stack([getattr(norm, name).detach() for norm in pair])[:, None] for name in ("weight", "bias"))

    def __call__(self, x):
        return torch.addcmul(self._bias, layer_norm(x, x.shape[-1:], eps=self._eps), self._weight)
