"""The signal fusion of DPR: projector, cross-attention, two-expert tower; and what a prompt asks of the item side.

Legend: N prompted positions, d hidden, D size of the sentence encoder, L keys of a prompt (1 for its sentence
vector, its tokens otherwise), C categories.
Source: arXiv:2602.18929, "Prompt embedder" and "Signal fusion".
"""

import torch
from torch import nn

from recbole_dpr.model.quick_layers import Dropout

N_INTENTS = 2


class Projector(nn.Module):
    """Frozen prompt vectors -> the backbone's space: an MLP [..., D] -> [..., d]."""

    def __init__(self, prompt_size, inner_size, hidden_size, dropout):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(prompt_size, inner_size), nn.GELU(), Dropout(dropout), nn.Linear(inner_size, hidden_size)
        )

    def forward(self, prompt):
        return self.layers(prompt)


class FusionBlock(nn.Module):
    """One expert: a = MHCA(h, e_p, e_p); z = h + a; h_up = z + FFN(z).

    Both branches start at zero, so training starts from the unprompted state.
    """

    def __init__(self, hidden_size, heads, inner_size, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden_size, heads, batch_first=True)
        self.norm = nn.LayerNorm(hidden_size)
        self.ffn = nn.Sequential(
            nn.Linear(hidden_size, inner_size), nn.GELU(), Dropout(dropout), nn.Linear(inner_size, hidden_size)
        )
        self.dropout = Dropout(dropout)
        for layer in (self.attention.out_proj, self.ffn[-1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, state, keys, padding=None):
        """Fuse states with prompts.

        Args:
            state: [N, d] queries.
            keys: [N, L, d] projected prompts.
            padding: bool [N, L], True where there is no key, or None.

        Returns:
            [N, d].
        """
        return self.fused(state, self.attended(state, keys, padding))

    def attended(self, state, keys, padding=None):
        """MHCA(h, e_p, e_p) [N, d]; arguments as for `forward`. Of ONE key no state is needed."""
        if keys.shape[1] == 1:
            return self.single_key(keys[:, 0])
        return self.attention(state[:, None], keys, keys, key_padding_mask=padding, need_weights=False)[0][:, 0]

    def fused(self, state, attended):
        """The states [N, d] with what the attention gave, [N, d]."""
        fused = state + self.dropout(attended)
        return fused + self.dropout(self.ffn(self.norm(fused)))

    def single_key(self, key):
        """Attention over ONE key: the softmax is 1 whatever the query, so the output is W_o W_v e_p: [N, d]."""
        size = key.shape[-1]
        values = nn.functional.linear(key, self.attention.in_proj_weight[2 * size :], self.attention.in_proj_bias[2 * size :])
        return self.attention.out_proj(values)


class ItemSideWeights(nn.Module):
    """How much a prompt asks of the items' own text, and of each category: [N, D] and [N, C + 1] -> [N, 1 + C].

    Beside the prompt, which noise covers in training, the hidden layer sees which category the prompt names, or none
    (`PromptBank.category_reader`): enough to tell a category from a wish, and too little to be memorised. The text's
    weight is scale x (1 + gate) x the probability that none is named: the words around a category describe no item.
    """

    def __init__(self, prompt_size, n_categories, scale, inner_size, dropout):
        super().__init__()
        self.scale = scale
        self.prompt, self.named = nn.Linear(prompt_size, inner_size), nn.Linear(n_categories + 1, inner_size, bias=False)
        self.output = nn.Sequential(nn.GELU(), Dropout(dropout), nn.Linear(inner_size, 1 + n_categories))
        nn.init.zeros_(self.output[-1].weight)
        nn.init.zeros_(self.output[-1].bias)

    def forward(self, prompt, named):
        weights = self.output(self.prompt(prompt) + self.named(named)).float()  # 1 + gate in bfloat16 has steps of 1/128
        return torch.cat([self.scale * (1 + weights[:, :1]) * named[:, -1:], weights[:, 1:]], dim=1)


class TwoExpertTower(nn.Module):
    """Hard routing by intent: positive prompts through the first expert, negative ones through the second.

    Args:
        make_expert: () -> nn.Module; called once per expert.
        two: False for one expert that serves both intents (an ablation of the paper).
    """

    def __init__(self, make_expert, two=True):
        super().__init__()
        self.experts = nn.ModuleList(make_expert() for _ in range(N_INTENTS if two else 1))

    def forward(self, intent, *inputs):
        """Route whole rows.

        Args:
            intent: an int for all rows, or int64 [N]: 0 positive, 1 negative.
            inputs: tensors with N rows (or None), handed to the expert.
        """
        return self.ask(type(self.experts[0]).__call__, intent, *inputs)

    def ask(self, what, intent, *inputs):
        """The same of any method of the experts: what(expert, *inputs)."""
        if isinstance(intent, int) or len(self.experts) == 1:
            return what(self.experts[intent % len(self.experts) if isinstance(intent, int) else 0], *inputs)
        outputs = [what(expert, *inputs) for expert in self.experts]
        chosen = intent.view(-1, *[1] * (outputs[0].dim() - 1)) == 0
        return torch.where(chosen, *outputs)
