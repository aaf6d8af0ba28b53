"""DPR: a sequential recommender of RecBole that a prompt can steer, and that answers as before without one.

Legend: B rows, T steps, N prompted positions, P rows of the prompt table, d hidden, D size of the sentence
encoder, C categories, V items, S = D + C size of the item side (0 in the paper's form), R size of the retrieval
vectors: d + S, or d + d + S with items decoupled.
Source: arXiv:2602.18929.
"""

from contextlib import contextmanager
from pathlib import Path

import recbole
import torch
from recbole.model.sequential_recommender import SASRec
from torch import nn

from recbole_dpr.data.loaders import PackedBatch
from recbole_dpr.model.backbones import AllPositions
from recbole_dpr.model.fusion import FusionBlock, ItemSideQuery, Projector, TwoExpertTower
from recbole_dpr.model.losses import softmax_cross_entropy
from recbole_dpr.precision import compute_dtype
from recbole_dpr.prompts.bank import NO_PROMPT

PROMPT, INTENT = "prompt_id", "prompt_intent"  # fields of a RecBole Interaction that carries prompts


class Promptable(AllPositions):
    """Mixin that adds the prompt path to a causal RecBole backbone.

    `calculate_loss`, `predict` and `full_sort_predict` keep RecBole's contract: an Interaction without prompt
    fields is answered by the plain backbone; with `prompt_id` (row of the prompt table) and `prompt_intent`
    (0 positive, 1 negative) by the fused state. A `PackedBatch` trains all positions.

    Besides the backbone's keys, config holds `prompt_size` (D) and `n_categories` (C), set from the encoder and
    the dataset, and the fusion keys of properties/dpr.yaml.
    """

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        size, heads = self.item_embedding.embedding_dim, config["fusion_heads"]
        prompt_size, inner, dropout = config["prompt_size"], config["fusion_inner_size"], config["fusion_dropout"]
        self.softmax_dtype = compute_dtype(config["softmax_precision"], config["device"])
        self.temperature, self.loss_weights = config["temperature"], config["loss_weights"]
        self.token_keys = config["prompt_keys"] == "token"
        self.projector = Projector(prompt_size, inner, size, dropout)
        self.tower = TwoExpertTower(lambda: FusionBlock(size, heads, inner, dropout), config["two_towers"])
        self.prompt_items = nn.Embedding(self.n_items, size, padding_idx=0) if config["decouple_items"] else None
        self.item_query = None
        side_size = 0
        if config["item_text"]:
            side_size = prompt_size + config["n_categories"]
            scales = iter(config["text_scale"])
            self.item_query = TwoExpertTower(
                lambda: ItemSideQuery(prompt_size, config["n_categories"], next(scales), inner, dropout), config["two_towers"]
            )
        self.register_buffer("item_side", torch.zeros(self.n_items, side_size))
        self.register_buffer("item_text_sum", torch.zeros(self.n_items, prompt_size if side_size else 0), persistent=False)
        self.register_buffer("prompt_vectors", torch.zeros(0, prompt_size), persistent=False)
        self.register_buffer("mean_state", torch.zeros(size))  # stands in for a user without a history
        self.prompt_tokens = None
        self.prompt_noise = 0.0
        self.train_backbone = True

    @classmethod
    def backbone_properties(cls):
        """RecBole's own property file of the backbone."""
        name = cls.__name__.removeprefix("DPR_")
        return Path(recbole.__file__).parent / "properties" / "model" / f"{name}.yaml"

    # --- what is attached once the data and the prompts are there

    def attach_items(self, text, text_sum, categories, unwrapping):
        """Set the item side.

        Args:
            text: float [V, D] of norm 1 or 0; text_sum: its sums before norming; categories: bool [V, C].
            unwrapping: two float [D, D], by intent (`PromptBank.unwrapping`).
        """
        if self.item_query is None:
            return
        self.item_side.copy_(torch.cat([text, categories.to(text)], dim=1))
        self.item_text_sum.copy_(text_sum)
        for expert, matrix in zip(self.item_query.experts, unwrapping):
            expert.unwrap.copy_(matrix)

    def attach_prompts(self, vectors, tokens=None):
        """Set the prompt table: float [P, D], and with token keys (float16 [total, D], int64 [P + 1] offsets)."""
        self.prompt_vectors = vectors.to(self.item_embedding.weight.device)
        self.prompt_tokens = tokens

    def start_prompting(self):
        """Called when stage 1 has ended: the prompted path's items start as the backbone's."""
        if self.prompt_items is not None:
            self.prompt_items.load_state_dict(self.item_embedding.state_dict())

    def fusion_parameters(self):
        """Parameters that DPR adds; all others are the backbone's."""
        return [p for name, p in self.named_parameters() if not self.is_backbone(name)]

    @staticmethod
    def is_backbone(name):
        """Whether a name of the state dict is the backbone's."""
        return not name.startswith(("projector.", "tower.", "prompt_items.", "item_query.", "item_side", "mean_state"))

    # --- vectors

    def fuse(self, state, prompt, intent, tokens=None, noisy=None):
        """The retrieval vector of prompted states.

        Args:
            state: [N, d]; prompt: [N, D]; intent: int or int64 [N].
            tokens: (float [N, L, D], bool [N, L] padding) with token keys, else None.
            noisy: [N, D], what the learned parts see of the prompt in training; default the prompt.

        Returns:
            fused state [N, d], item side query [N, S] (S = 0 in the paper's form).
        """
        noisy = prompt if noisy is None else noisy
        keys, padding = (noisy[:, None], None) if tokens is None else tokens
        fused = self.tower(intent, state, self.projector(keys), padding)
        side = self.item_query(intent, prompt, noisy) if self.item_query else state.new_zeros(len(state), 0)
        return fused, side

    @property
    def answering_items(self):
        """[V, d]: the item embeddings that prompted states are matched with."""
        return (self.item_embedding if self.prompt_items is None else self.prompt_items).weight

    def item_vectors(self):
        """[V, R]: the item half of the dot product."""
        own = [] if self.prompt_items is None else [self.prompt_items.weight]
        return torch.cat([self.item_embedding.weight, *own, self.item_side], dim=1)

    def unprompted_vectors(self, state):
        """[B, R]: the user half without a prompt; score = the backbone's own."""
        return nn.functional.pad(state, (0, self.item_vector_size - state.shape[1]))

    @property
    def prompted_start(self):
        """Where the prompted state begins in a retrieval vector."""
        return 0 if self.prompt_items is None else self.item_embedding.embedding_dim

    def prompted_vectors(self, state, prompt, intent, tokens=None):
        """[N, R]: the user half with a prompt; arguments as for `fuse`."""
        fused = torch.cat(self.fuse(state, prompt, intent, tokens), dim=1)
        return nn.functional.pad(fused, (self.prompted_start, 0))

    @property
    def item_vector_size(self):
        """R."""
        copies = 1 if self.prompt_items is None else 2
        return copies * self.item_embedding.embedding_dim + self.item_side.shape[1]

    def tokens_of(self, prompt):
        """The token keys of rows of the prompt table; None with sentence keys."""
        if not self.token_keys:
            return None
        flat, offsets = self.prompt_tokens
        prompt = prompt.cpu()
        lengths = offsets[prompt + 1] - offsets[prompt]
        steps = torch.arange(int(lengths.max()))
        padding = steps >= lengths[:, None]  # [N, L]
        tokens = flat[(offsets[prompt][:, None] + steps).clamp(max=len(flat) - 1)].float()
        device = self.item_embedding.weight.device
        return tokens.to(device), padding.to(device)

    # --- RecBole's contract

    def calculate_loss(self, interaction):
        """Weighted losses (SEQ, POS, NEG) of a PackedBatch; the backbone's own loss of an Interaction."""
        if not isinstance(interaction, PackedBatch):
            return super().calculate_loss(interaction)
        with self._backbone_as_it_trains():
            states = self.states(interaction.item_seq)
            states = states.reshape(-1, states.shape[-1])  # [B * T, d]
        weights, losses = self.loss_weights, []
        if self.train_backbone and weights["seq"]:
            loss = softmax_cross_entropy(
                states[interaction.rows], self.item_embedding.weight, interaction.targets, dtype=self.softmax_dtype
            )
            losses.append(weights["seq"] * loss)
        items = self.answering_items
        if self.prompt_items is None and not self.train_backbone:
            items = items.detach()
        for part, name in zip(interaction.prompted, ("pos", "neg")):
            if weights[name] and len(part.rows):
                losses.append(weights[name] * self._prompted_loss(states[part.rows], items, part))
        return tuple(losses)

    @contextmanager
    def _backbone_as_it_trains(self):
        """With a frozen backbone: no gradient, and no dropout, so that the tower sees the states it will answer from."""
        frozen, training = not self.train_backbone, self.training
        if frozen:
            self.eval()
        try:
            with torch.set_grad_enabled(not frozen and torch.is_grad_enabled()):
                yield
        finally:
            self.train(training)

    def _prompted_loss(self, state, items, part):
        prompt = self.prompt_vectors[part.prompt]
        tokens, noisy = self.tokens_of(part.prompt), None
        if self.training and self.prompt_noise:
            scale = self.prompt_noise / prompt.shape[1] ** 0.5
            noisy = prompt + scale * torch.randn_like(prompt)
            if tokens:
                tokens = tokens[0] + scale * torch.randn_like(tokens[0]), tokens[1]
        fused, side = self.fuse(state, prompt, part.intent, tokens, noisy)
        own = None
        if self.item_query:
            own = part.own_item, (side * self._own_side(part)).sum(1)
        return softmax_cross_entropy(fused, items, part.targets, self.temperature, side, self.item_side, own, self.softmax_dtype)

    def _own_side(self, part):
        """The item side of the prompts' own items without the very phrase that is the prompt: [N, S].

        Otherwise the model learns to trust an exact match that no real request gives it.
        """
        own = self.item_side[part.own_item]
        repeated = (part.own_phrase != NO_PROMPT)[:, None]
        phrase = self.prompt_vectors[part.own_phrase.clamp(min=0)]
        text = nn.functional.normalize(self.item_text_sum[part.own_item] - phrase, dim=1)
        size = text.shape[1]
        return torch.cat([torch.where(repeated, text, own[:, :size]), own[:, size:]], dim=1)

    def _vectors_for(self, interaction):
        """Retrieval vectors of an Interaction, [B, R]."""
        state = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        if PROMPT not in interaction:
            return self.unprompted_vectors(state)
        prompt = interaction[PROMPT]
        return self.prompted_vectors(state, self.prompt_vectors[prompt], interaction[INTENT], self.tokens_of(prompt))

    def predict(self, interaction):
        """Scores of the interaction's items, [B]."""
        return (self._vectors_for(interaction) * self.item_vectors()[interaction[self.ITEM_ID]]).sum(1)

    def full_sort_predict(self, interaction):
        """Scores of all items, [B, V]."""
        return self._vectors_for(interaction) @ self.item_vectors().T


class DPR_SASRec(Promptable, SASRec):
    """DPR over SASRec (Kang and McAuley, arXiv:1808.09781), RecBole's implementation."""


MODELS = {"DPR_SASRec": DPR_SASRec}
