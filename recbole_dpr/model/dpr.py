"""DPR: a sequential recommender of RecBole that a prompt can steer, and that answers as before without one.

Legend: B rows, T steps, N prompted positions, P rows of the prompt table, d hidden, D size of the sentence
encoder, C categories, V items, k size of a backbone's states (d, and constants behind), S = D + 1 + C size of the item
side (0 in the paper's form), R size of the retrieval vectors: k + S, or k + k + S with a backbone of their own for
prompted requests.
Source: arXiv:2602.18929.
"""

from contextlib import contextmanager
from functools import cache
from pathlib import Path

import recbole
import torch
from torch import nn

from recbole_dpr.data.loaders import PackedBatch
from recbole_dpr.errors import unknown
from recbole_dpr.model.backbones import CausalGRU4Rec, CausalSASRec, MaskedBERT4Rec, sequential_models, wrapped
from recbole_dpr.model.fusion import N_INTENTS, FusionBlock, ItemSideWeights, Projector, TwoExpertTower
from recbole_dpr.model.kept_rows import KeptRows
from recbole_dpr.model.losses import TextScores, in_few_shapes, softmax_cross_entropy
from recbole_dpr.precision import compute_dtype
from recbole_dpr.prompts.bank import NO_PROMPT, PromptTable
from recbole_dpr.prompts.description import DescriptionTagger
from recbole_dpr.prompts.meaning import MeaningReader, affine
from recbole_dpr.prompts.templates import NEGATIVE, POSITIVE

PROMPT, INTENT = "prompt_id", "prompt_intent"  # fields of a RecBole Interaction that carries prompts
# weight of a category meant without its name, by intent, beside one that is named; chosen on validation (docs/serving.md): a wish has its
# text as well, while a refusal's says little of what else to show
_MEANT = (0.1, 1.5)
_KEPT_BYTES = 2**28  # of each of the two tables that training keeps of the items' text


class Promptable:
    """Mixin that adds the prompt path to a backbone (`model.backbones`).

    `calculate_loss`, `predict` and `full_sort_predict` keep RecBole's contract: an Interaction without prompt
    fields is answered by the plain backbone; with `prompt_id` (row of the prompt table) and `prompt_intent`
    (0 positive, 1 negative) by the fused state. A `PackedBatch` trains the positions that it names.

    Besides the backbone's keys, config holds `prompt_size` (D) and `n_categories` (C), set from the encoder and
    the dataset, and the keys of properties/training.yaml.
    """

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        size, heads = self.item_embedding.embedding_dim, config["fusion_heads"]
        prompt_size, inner, dropout = config["prompt_size"], config["fusion_inner_size"], config["fusion_dropout"]
        self.softmax_dtype = compute_dtype(config["softmax_precision"], config["device"])
        # the scores of a backbone with a temperature of its own (CORE) have it in them
        self.prompt_temperature = 1.0 if hasattr(self, "temperature") else config["temperature"]
        self.loss_weights = config["loss_weights"]
        self.token_keys = config["prompt_keys"] == "token"
        self.tagger = DescriptionTagger(prompt_size) if config["read_prompts"] else None
        self.projector = Projector(prompt_size, inner, size, dropout)
        self.tower = TwoExpertTower(lambda: FusionBlock(size, heads, inner, dropout), config["two_towers"])
        self.prompted_backbone = self.backbone_class(config, dataset) if config["decouple_backbone"] else None
        self.item_weights = None
        text_size = side_size = 0
        if config["item_text"]:
            text_size, side_size = prompt_size, prompt_size + 1 + config["n_categories"]
            scales = iter(config["text_scale"])
            self.item_weights = TwoExpertTower(
                lambda: ItemSideWeights(prompt_size, config["n_categories"], next(scales), inner, dropout), config["two_towers"]
            )
        self.text_size = text_size
        self.register_buffer("item_side", torch.zeros(self.n_items, side_size))
        # one row more than the prompt has: the bias
        self.register_buffer("category_reader", torch.zeros(N_INTENTS, prompt_size + 1, config["n_categories"] + 1 if text_size else 0))
        self.meaning_reader = MeaningReader(prompt_size, config["n_categories"] if text_size else 0)
        self.prompt_vectors = PromptTable(torch.zeros(0, prompt_size))
        # the average user, who stands in for one without a history: unprompted, prompted
        self.register_buffer("mean_states", torch.zeros(2, self.state_size))
        self.item_text = self.prompt_tokens = None
        self.forget_texts()
        self.prompt_noise = 0.0
        self.train_backbone = True
        self.unprompted_weight = config["unprompted_weight"]

    @classmethod
    def backbone_properties(cls):
        """RecBole's own property file of the backbone."""
        name = cls.__name__.removeprefix("DPR_")
        return Path(recbole.__file__).parent / "properties" / "model" / f"{name}.yaml"

    # --- what is attached once the data and the prompts are there

    def attach_items(self, text, categories, category_reader, meaning_reader):
        """Set the item side.

        Args:
            text: ItemText; categories: bool [V, C].
            category_reader: for each intent what `PromptBank.category_reader` returns; meaning_reader: MeaningReader.
        """
        self.forget_texts()
        self.item_text = text
        self.item_side.copy_(torch.cat([text.vectors, text.offsets[:, None], categories.to(text.vectors)], dim=1))
        self.category_reader.copy_(torch.stack([torch.cat([weight, bias[None]]) for weight, bias in category_reader]))
        self.meaning_reader.load_state_dict(meaning_reader.state_dict())

    def attach_prompts(self, vectors, tokens=None, tagger=None):
        """Set the prompt table.

        Args:
            vectors: PromptTable of what the prompts ask for.
            tokens: with token keys, of its U distinct ones (float16 [total, D], int64 [U + 1] offsets).
            tagger: DescriptionTagger that found in the prompts what they ask for; kept for requests to come.
        """
        self.forget_texts()
        self.prompt_vectors = vectors.to(self.item_embedding.weight.device)
        self.prompt_tokens = tokens
        if self.tagger is not None:
            self.tagger.load_state_dict(tagger.state_dict())

    def start_prompting(self):
        """Called when stage 1 has ended: the prompted path's backbone starts as a copy of the unprompted one."""
        if self.prompted_backbone is not None:
            own = self.prompted_backbone.state_dict()
            self.prompted_backbone.load_state_dict({name: value for name, value in self.state_dict().items() if name in own})

    def forget_texts(self):
        """Drop the tables that training keeps of the items' text; the next batch begins them anew.

        Called with each epoch, so that its bits do not depend on the calls that filled them, and at a stage's end for the memory.
        """
        self.text_fits = self.texts_without = None

    @property
    def answering(self):
        """The backbone that prompted requests go through."""
        return self if self.prompted_backbone is None else self.prompted_backbone

    @staticmethod
    def is_backbone(name):
        """Whether a name of the state dict is the unprompted backbone's."""
        return not name.startswith(("prompted_backbone.", "projector.", "tower.", "item_weights.", "item_side", "category_reader", "meaning_reader", "tagger.", "mean_states"))

    def backbone_parameters(self):
        """What stage 1 trains."""
        return [p for name, p in self.named_parameters() if self.is_backbone(name)]

    def answering_parameters(self):
        """The parameters of the backbone that prompted requests go through."""
        return self.backbone_parameters() if self.prompted_backbone is None else list(self.prompted_backbone.parameters())

    def fusion_parameters(self):
        """The fusion tower's and the item side's parameters."""
        return [p for name, p in self.named_parameters() if name.startswith(("projector.", "tower.", "item_weights."))]

    # --- vectors

    def fuse(self, state, prompt, named, intent, tokens=None):
        """What is learned of a prompted retrieval vector.

        Args:
            state: [N, k]; prompt: [N, D]; intent: int or int64 [N].
            named: [N, C + 1], from the method of this name.
            tokens: (float [N, L, D], bool [N, L] padding) with token keys, else None.

        Returns:
            fused state [N, k]; weights of the item side [N, 1 + C]: its text, its categories (None in the paper's form).
        """
        attended = self.attended(state, *self.keys(prompt, tokens), intent)
        return self.moved(state, attended, intent), self.item_side_weights(prompt, named, intent)

    def keys(self, prompt, tokens=None):
        """What the cross-attention meets of prompts [N, D], whoever asks: [N, L, d], and its padding, bool [N, L] or None."""
        keys, padding = (prompt[:, None], None) if tokens is None else tokens
        return self.projector(keys), padding

    def attended(self, state, keys, padding, intent):
        """What the cross-attention makes of `keys` [N, L, d] for states [N, k]: [N, d]. With sentence keys, L = 1, state may be None."""
        own = None if state is None else state[:, : keys.shape[2]]
        return self.tower.ask(FusionBlock.attended, intent, own, keys, padding)

    def moved(self, state, attended, intent):
        """States [N, k] fused with what is `attended` [N, d]: [N, k]."""
        size = attended.shape[1]
        return torch.cat([self.tower.ask(FusionBlock.fused, intent, state[:, :size], attended), state[:, size:]], dim=1)

    def item_side_weights(self, prompt, named, intent):
        """[N, 1 + C]: what prompts ask of the items' text, and of each category; None in the paper's form."""
        return None if self.item_weights is None else self.item_weights(intent, prompt, named)

    def item_side_vectors(self, prompt, intent):
        """[N, S]: the part of `prompted_vectors` that meets the item side, whoever asks."""
        weights = self.item_side_weights(prompt, self.heard(prompt, intent), intent)
        return prompt[:, :0] if weights is None else _item_side_vectors(prompt, weights)

    def named(self, prompt, intent):
        """Which category prompts name: [N, C + 1] probabilities, the last of none; None in the paper's form."""
        if self.item_weights is None:
            return None
        return _by_intent(prompt, self.category_reader, intent).softmax(dim=-1)

    def heard(self, prompt, intent):
        """`named`, plus the categories that prompts mean without naming them, weighted by `_MEANT`: [N, C + 1]; None in the paper's form.

        People tell what they are tired of by what happens in it ("I faint at the sight of gore"), and what they are in the mood for
        too. Training does not hear it: its phrases are of one item, and what complies with a refusal lacks one category of it,
        whichever. Only for refusals does the probability of none go down, with which the text's weight is multiplied.
        """
        named = self.named(prompt, intent)
        if named is None:
            return None
        meant, none = self.meaning_reader(prompt), named[:, -1:]
        intent = torch.full_like(none, intent) if isinstance(intent, int) else intent[:, None]
        weight = torch.where(intent == NEGATIVE, _MEANT[NEGATIVE], _MEANT[POSITIVE])
        left = torch.where(intent == NEGATIVE, (1 - meant).prod(1, keepdim=True), 1.0)
        return torch.cat([named[:, :-1] + weight * none * meant, none * left], dim=1)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Also that of an older model, by `MeaningReader.completed`."""
        return super().load_state_dict(self.meaning_reader.completed(state_dict, "meaning_reader"), *args, **kwargs)

    def item_vectors(self):
        """[V, R]: the item half of the dot product."""
        return torch.cat([self.backbone_items(), self.item_side], dim=1)

    def backbone_items(self):
        """[V, R - S]: the part of `item_vectors` that the backbones learned."""
        own = self.item_matrix()
        return own if self.prompted_backbone is None else torch.cat([own, self.prompted_backbone.item_matrix()], dim=1)

    def unprompted_vectors(self, state):
        """[B, R]: the user half without a prompt; score = the backbone's own."""
        return nn.functional.pad(state, (0, self.item_vector_size - state.shape[1]))

    def resting_vectors(self, unprompted, state):
        """[N, R]: the user half of a prompt that moves nothing.

        Args:
            unprompted: [N, k] states of the unprompted backbone; state: [N, k] of the answering one (the same without
                `decouple_backbone`).
        """
        return nn.functional.pad(self.resting_part(unprompted, state), (0, self.item_side.shape[1]))

    def prompted_vectors(self, unprompted, state, prompt, intent, tokens=None):
        """[N, R]: the user half with a prompt [N, D]; arguments as for `resting_vectors` and `fuse`."""
        own, weights = self.prompted_parts(unprompted, state, prompt, intent, tokens)
        return own if weights is None else torch.cat([own, _item_side_vectors(prompt, weights)], dim=1)

    def prompted_parts(self, unprompted, state, prompt, intent, tokens=None):
        """What `prompted_vectors` are made of: their part that meets the backbones' item vectors, and `fuse`'s weights of the item side."""
        fused, weights = self.fuse(state, prompt, self.heard(prompt, intent), intent, tokens)
        return self.resting_part(unprompted, fused), weights

    def resting_part(self, unprompted, state):
        """[N, R - S]: the part of `resting_vectors` that meets the backbones' item vectors."""
        return state if self.prompted_backbone is None else torch.cat([self.unprompted_weight * unprompted, state], dim=1)

    @property
    def item_vector_size(self):
        """R."""
        copies = 1 if self.prompted_backbone is None else 2
        return copies * self.state_size + self.item_side.shape[1]

    def tokens_of(self, prompt):
        """The token keys of rows of the prompt table; None with sentence keys."""
        if not self.token_keys:
            return None
        flat, offsets = self.prompt_tokens
        prompt = self.prompt_vectors.row[prompt].cpu()
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
        if not interaction.prompted:
            return (interaction.weight * self.pretraining_loss(interaction, self.softmax_dtype),)
        with self._backbone_as_it_trains():
            states, items = self.answering.batch_states(interaction), self.answering.item_matrix()
        if not self.train_backbone:
            items = items.detach()
        weights, losses = self.loss_weights, []
        if weights["seq"] and self.train_backbone:
            loss = softmax_cross_entropy(states[interaction.rows], items, interaction.targets, dtype=self.softmax_dtype)
            losses.append(weights["seq"] * interaction.weight * loss)
        for part, name in zip(interaction.prompted, ("pos", "neg")):
            if weights[name] and len(part.rows):
                losses.append(weights[name] * part.weight * self._prompted_loss(states, items, part))
        return tuple(losses)

    def implicit_loss(self, batch):
        """Weighted losses (POS, NEG) of a PackedBatch's prompted targets on the unprompted backbone, which is told no prompt."""
        states, items = self.batch_states(batch), self.item_matrix()
        return tuple(
            self.loss_weights[name]
            * part.weight
            * softmax_cross_entropy(states[part.rows], items, part.targets, self.prompt_temperature, dtype=self.softmax_dtype)
            for part, name in zip(batch.prompted, ("pos", "neg"))
            if self.loss_weights[name] and len(part.rows)
        )

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

    def _prompted_loss(self, states, items, part):
        """Mean loss of PromptedTargets; states: [B * T, k], items: [V, k]."""
        named, n_texts = self.named(self.prompt_vectors[part.prompt], part.intent), 0
        if named is not None:  # rows that name a category go last, without text: its weight there is below what products round
            naming = named[:, -1] < torch.finfo(self.softmax_dtype).eps / 8
            order, n_texts = torch.argsort(naming, stable=True), len(naming) - int(naming.sum())
            part, named = part.take(order), in_few_shapes(named[order])
        rows = in_few_shapes(part.prompt)
        exact, tokens = self.prompt_vectors[rows], self.tokens_of(rows)
        prompt = exact
        if self.training and self.prompt_noise:
            scale = self.prompt_noise / prompt.shape[1] ** 0.5
            prompt = prompt + scale * torch.randn_like(prompt)
            if tokens:
                tokens = tokens[0] + scale * torch.randn_like(tokens[0]), tokens[1]
        with self.low_precision():
            fused, weights = self.fuse(in_few_shapes(states[part.rows]), prompt, named, part.intent, tokens)
        fused, text = fused[: len(part.rows)], None
        if weights is not None:
            weights = weights[: len(part.rows)]
            text = self._text_scores(weights[:n_texts, 0], exact, part) if n_texts else None
            fused = torch.cat([fused, weights[:, 1:]], dim=1)
            items = torch.cat([items, self.item_side[:, self.text_size + 1 :]], dim=1)
        return softmax_cross_entropy(fused, items, part.targets, self.prompt_temperature, text, self.softmax_dtype)

    def _text_scores(self, weight, prompt, part):
        """The text side of a batch, where the item that a prompt quotes is met without that very phrase.

        Otherwise the model learns to trust an exact match that no real request gives it. There is no noise here:
        nothing is learned of the fit that could be memorised.

        Args:
            weight: [M]; prompt: [M or more, D], without noise; part: PromptedTargets, of which the first M have text.
        """
        if self.text_fits is None:
            low = self.softmax_dtype.itemsize
            self.text_fits = KeptRows(len(self.prompt_vectors.vectors), self._fits_of, _KEPT_BYTES // (low * self.n_items))
            self.texts_without = KeptRows(self.item_text.phrases.numel(), self._texts_without, _KEPT_BYTES // (4 * self.text_size))
        # row 0 is the padding, whose text is 0
        own_item, own_fit = weight.new_zeros(len(weight), dtype=torch.int64), torch.zeros_like(weight)
        quoting = torch.nonzero(part.own_number[: len(weight)] != NO_PROMPT).squeeze(1)
        if len(quoting):
            own_item[quoting] = part.own_item[quoting]
            table, place = self.texts_without(own_item[quoting] * self.item_text.phrases.shape[1] + part.own_number[quoting])
            left = table[place]
            own_fit[quoting] = (prompt[quoting] * left[:, :-1]).sum(1) + left[:, -1]
        return TextScores(weight, *self.text_fits(self.prompt_vectors.row[part.prompt[: len(weight)]]), own_item, own_fit)

    def _fits_of(self, prompt):
        """How well prompts fit the text of all items: int64 [n] of the U distinct ones -> [n, V]."""
        low, text = self.softmax_dtype, self.item_text
        fit = in_few_shapes(self.prompt_vectors.vectors[prompt].to(low)) @ text.vectors.to(low).T
        return fit[: len(prompt)].add_(text.offsets.to(low))

    def _texts_without(self, quoted):
        """The text side of items without one of their phrases, offset last: places int64 [n] in [V, K] flattened -> [n, D + 1]."""
        item, number = quoted // self.item_text.phrases.shape[1], quoted % self.item_text.phrases.shape[1]
        left, offset = self.item_text.without(item, self.prompt_vectors[self.item_text.phrases[item, number]])
        return torch.cat([left, offset[:, None]], dim=1)

    def _vectors_for(self, interaction):
        """Retrieval vectors of an Interaction, [B, R]."""
        history = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        if PROMPT not in interaction:
            return self.unprompted_vectors(self.encode(*history))
        states, prompt = [backbone.encode(*history) for backbone in (self, self.answering)], interaction[PROMPT]
        return self.prompted_vectors(*states, self.prompt_vectors[prompt], interaction[INTENT], self.tokens_of(prompt))

    def predict(self, interaction):
        """Scores of the interaction's items, [B]."""
        return (self._vectors_for(interaction) * self.item_vectors()[interaction[self.ITEM_ID]]).sum(1)

    def full_sort_predict(self, interaction):
        """Scores of all items, [B, V]."""
        return self._vectors_for(interaction) @ self.item_vectors().T


def _item_side_vectors(prompt, weights):
    """What meets `item_side`, [N, S], of prompts [N, D] and weights [N, 1 + C]."""
    return torch.cat([weights[:, :1] * prompt, weights], dim=1)


def _by_intent(prompt, maps, intent):
    """[N, k]: prompts [N, D] through the map of their intent; maps [2, D + 1, k] as for `affine`, intent an int or int64 [N]."""
    if isinstance(intent, int):
        return affine(prompt, maps[intent])
    return torch.where(intent[:, None] == 0, affine(prompt, maps[0]), affine(prompt, maps[1]))


class DPR_SASRec(Promptable, CausalSASRec):
    """DPR over SASRec (Kang and McAuley, arXiv:1808.09781), RecBole's implementation."""

    backbone_class = CausalSASRec


class DPR_GRU4Rec(Promptable, CausalGRU4Rec):
    """DPR over GRU4Rec (Tan et al., arXiv:1606.08117), RecBole's implementation."""

    backbone_class = CausalGRU4Rec


class DPR_BERT4Rec(Promptable, MaskedBERT4Rec):
    """DPR over BERT4Rec (Sun et al., arXiv:1904.06690), RecBole's implementation."""

    backbone_class = MaskedBERT4Rec


MODELS = {"DPR_SASRec": DPR_SASRec, "DPR_GRU4Rec": DPR_GRU4Rec, "DPR_BERT4Rec": DPR_BERT4Rec}


def is_promptable(name):
    """Whether a model's name is that of a DPR model: one of `MODELS`, or DPR_<any sequential recommender of RecBole>."""
    return name.startswith("DPR_")


@cache
def promptable(name):
    """The class of a DPR model.

    Raises:
        UserError: no such model, or a backbone that cannot be wrapped.
    """
    if name in MODELS:
        return MODELS[name]
    if name.removeprefix("DPR_") not in sequential_models():
        raise unknown("model", name, [f"DPR_{backbone}" for backbone in sequential_models()])
    backbone = wrapped(name.removeprefix("DPR_"))
    return type(name, (Promptable, backbone), {"backbone_class": backbone, "__module__": __name__})
