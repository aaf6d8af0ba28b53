"""RecBole's sequential recommenders as backbones: histories -> states, items -> vectors, score = dot product.

Legend: B rows, T steps, M training positions, V items, L = MAX_ITEM_LIST_LENGTH, d hidden, k = d + n_constants.
"""

import inspect
from functools import cache

import torch
from recbole.data.interaction import Interaction
from recbole.model import sequential_recommender
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.model.sequential_recommender import BERT4Rec, GRU4Rec, SASRec
from torch.nn.functional import pad

from recbole_dpr import distributed
from recbole_dpr.data.loaders import PackedLoader, PrefixLoader
from recbole_dpr.errors import UserError
from recbole_dpr.model.losses import softmax_cross_entropy
from recbole_dpr.model.quick_layers import causal_mask, make_causal, quicken
from recbole_dpr.precision import compute_dtype

_TRIAL_ITEMS = 8  # of the vocabulary that a backbone is tried on


class Backbone:
    """Mixin over a RecBole sequential recommender: what DPR asks of it.

    Besides what stands here a backbone has `loader`, the batches that it trains on, `batch_states`, [M, k] at all
    positions of such a batch, and `pretraining_loss`, what stage 1 minimises.

    Attributes:
        n_constants: columns of a state behind its d learned ones; the fusion leaves them alone.
    """

    n_constants = 0

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        quicken(self)
        self.train_dtype = compute_dtype(config["backbone_precision"] or "auto", config["device"])  # older models lack the key

    def low_precision(self):
        """Context in which matrix products are those of training; weights, their gradients and the optimiser stay in float32."""
        low = self.train_dtype != torch.float32
        return torch.autocast(self.item_embedding.weight.device.type, self.train_dtype, enabled=low)

    @property
    def state_size(self):
        """k."""
        return self.item_embedding.embedding_dim + self.n_constants

    def encode(self, item_seq, item_seq_len):
        """States after whole histories: int64 [B, T], left-aligned, and their lengths int64 [B] -> [B, k]."""
        return self.forward(item_seq, item_seq_len)

    def item_matrix(self):
        """[V, k]: the item half of the dot product."""
        return self.item_embedding.weight


class AllPositions(Backbone):
    """Mixin over a causal RecBole model that ends its `forward` with `gather_indexes` (SASRec, GRU4Rec).

    `states` runs that very forward and leaves the gathering out, so nothing of the backbone is copied.
    """

    _keep_positions = False

    @staticmethod
    def loader(sequences, config, stage, seed, prompts=None):
        """Packed sequences, every position a target; stage: the keys of a stage."""
        batch_size = stage.get("train_batch_size", config["train_batch_size"]) * distributed.world_size()
        return PackedLoader(sequences, config["MAX_ITEM_LIST_LENGTH"], batch_size, seed, prompts)

    def gather_indexes(self, output, gather_index):
        return output if self._keep_positions else super().gather_indexes(output, gather_index)

    def states(self, item_seq):
        """Hidden states after every item of left-aligned sequences.

        Args:
            item_seq: int64 [B, T], padded with 0 on the right.

        Returns:
            float [B, T, d].
        """
        self._keep_positions = True
        try:
            return self.forward(item_seq, torch.ones_like(item_seq[:, 0]))
        finally:
            self._keep_positions = False

    def batch_states(self, batch):
        with self.low_precision():
            states = self.states(batch.item_seq)
        return states.float().reshape(-1, states.shape[-1])  # [B * T, d]

    def pretraining_loss(self, batch, dtype):
        """Cross-entropy of the next item at every position; dtype as for `softmax_cross_entropy`."""
        return softmax_cross_entropy(self.batch_states(batch)[batch.rows], self.item_matrix(), batch.targets, dtype=dtype)


class CausalSASRec(AllPositions, SASRec):
    """SASRec (Kang and McAuley, arXiv:1808.09781), RecBole's implementation, with `states`."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        make_causal(self)

    def get_attention_mask(self, item_seq, bidirectional=False):
        return causal_mask(item_seq.shape[1], item_seq.device)

    def encode(self, item_seq, item_seq_len):
        """An answer needs one position of the last layer: half the work of `forward` at two layers."""
        if self.training or torch.compiler.is_compiling():  # ONNX's exporter fixes B where rows are picked so
            return super().encode(item_seq, item_seq_len)
        x = self.LayerNorm(self.item_embedding(item_seq) + self.position_embedding.weight[: item_seq.shape[1]])  # [B, T, d]
        *layers, last = self.trm_encoder.layer
        for layer in layers:
            x = layer(x, self.get_attention_mask(item_seq))
        return last.feed_forward(last.multi_head_attention.at_end(x, item_seq_len))


class CausalGRU4Rec(AllPositions, GRU4Rec):
    """GRU4Rec (Tan et al., arXiv:1606.08117), RecBole's implementation, with `states`."""


class Prefixes(Backbone):
    """Mixin over a RecBole model of whose states only the one after a whole history has not seen the future."""

    @staticmethod
    def loader(sequences, config, stage, seed, prompts=None):
        """Sampled histories, one target each."""
        batch_size = config["prefix_batch_size"] * distributed.world_size()
        return PrefixLoader(sequences, config["MAX_ITEM_LIST_LENGTH"], config["prefixes_per_sequence"], batch_size, seed, prompts)

    def batch_states(self, batch):
        with self.low_precision():
            states = self.encode(batch.item_seq, batch.lengths)
        return states.float()


class MaskedBERT4Rec(Prefixes, BERT4Rec):
    """BERT4Rec (Sun et al., arXiv:1904.06690), RecBole's implementation: the state after a history is that of a mask.

    Its scores have a bias for each item: one more column of the item matrix, and a 1 behind every state.
    """

    n_constants = 1

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.ft_ratio = config["ft_ratio"]

    def encode(self, item_seq, item_seq_len):
        """[B, d + 1]; a history that fills L loses its oldest item to the mask.

        RecBole's `reconstruct_test_data` takes the oldest item of every history, so that one of a single item would
        be answered from the mask alone; for those that fill L both are the same.
        """
        masked, last = self._append(item_seq, item_seq_len, torch.full_like(item_seq_len, self.mask_token))
        return pad(self.gather_indexes(self.forward(masked), last), (0, 1), value=1.0)

    def item_matrix(self):
        return torch.cat([self.item_embedding.weight[: self.n_items], self.output_bias[:, None]], dim=1)

    def _append(self, item_seq, item_seq_len, item):
        """Sequences with one more item at their end, of at most L: int64 [B, T'], and where it stands: int64 [B]."""
        longer = pad(item_seq, (0, 1)).scatter(1, item_seq_len[:, None], item[:, None])
        if longer.shape[1] <= self.max_seq_length:
            return longer, item_seq_len
        full = item_seq_len == self.max_seq_length
        return torch.where(full[:, None], longer[:, 1:], longer[:, :-1]), item_seq_len - full.long()

    def pretraining_loss(self, batch, dtype):
        """The masked objective: RecBole's `MaskItemSequence`, for a whole batch at once.

        In a share `ft_ratio` of the batches the last item alone is masked, which is the task that the model answers;
        in the others every item with probability `mask_ratio`.
        """
        sequence, last = self._append(batch.item_seq, batch.lengths, batch.targets)
        if torch.rand(()) < self.ft_ratio:
            masked = torch.arange(sequence.shape[1], device=last.device) == last[:, None]
        else:
            masked = (torch.rand(sequence.shape, device=sequence.device) < self.mask_ratio) & (sequence > 0)
        return self.masked_loss(sequence, masked, dtype)

    def masked_loss(self, sequence, masked, dtype=None):
        """Cross-entropy of the masked items.

        Args:
            sequence: int64 [B, T], padded with 0 on the right; masked: bool [B, T].
            dtype: as for `softmax_cross_entropy`.
        """
        with self.low_precision():
            states = self.forward(sequence.masked_fill(masked, self.mask_token))[masked].float()
        return softmax_cross_entropy(pad(states, (0, 1), value=1.0), self.item_matrix(), sequence[masked], dtype=dtype)


class WholeHistory(Prefixes):
    """Mixin over any RecBole model with `forward(item_seq, item_seq_len) -> [B, d]`, see `wrapped`.

    Histories are padded to L, as RecBole's are: some models insist on it, the answers of others depend on it.
    """

    _state_given = None

    def __init__(self, config, dataset):
        super().__init__(config, ItemVocabulary(dataset.num(config["ITEM_ID_FIELD"]), config))

    def forward(self, *inputs):
        return super().forward(*inputs) if self._state_given is None else self._state_given

    def encode(self, item_seq, item_seq_len):
        return self.forward(self._padded(item_seq), item_seq_len) if self.takes_length else self.forward(self._padded(item_seq))

    def item_matrix(self):
        """[V, d], read off RecBole's own `full_sort_predict`: its scores of the unit vectors, gradient included."""
        size, device = self.state_size, self.item_embedding.weight.device
        history = torch.ones(size, 1, dtype=torch.int64, device=device)
        self._state_given = torch.eye(size, device=device)
        try:
            return super().full_sort_predict(self._interaction(history, history[:, 0])).T
        finally:
            self._state_given = None

    def pretraining_loss(self, batch, dtype):
        """The backbone's own loss, with what it adds to the cross-entropy."""
        interaction = self._interaction(batch.item_seq, batch.lengths, **{self.ITEM_ID: batch.targets})
        return super().calculate_loss(interaction).squeeze()  # NextItNet's is of shape [1]

    def _padded(self, item_seq):
        return pad(item_seq, (0, self.max_seq_length - item_seq.shape[1]))

    def _interaction(self, item_seq, item_seq_len, **fields):
        return Interaction({self.ITEM_SEQ: self._padded(item_seq), self.ITEM_SEQ_LEN: item_seq_len, **fields})

    def try_out(self):
        """Raise UserError unless states and item vectors are as DPR needs them; the model is a trial one."""
        name = self.name
        if not isinstance(getattr(self, "item_embedding", None), torch.nn.Embedding):
            raise _refused(name, "it has no item_embedding")
        length = min(3, self.max_seq_length)
        item_seq = torch.stack([torch.arange(1, length + 1), torch.tensor([5] + [0] * (length - 1))])
        histories = [x.to(self.item_embedding.weight.device) for x in (item_seq, torch.tensor([length, 1]))]
        states = self.encode(*histories)
        if states.shape != (2, self.state_size):
            raise _refused(name, f"its forward gives {list(states.shape)} for 2 histories, one state [2, {self.state_size}] is needed")
        scores = super().full_sort_predict(self._interaction(*histories))
        if scores.shape != (2, _TRIAL_ITEMS) or not torch.allclose(scores, states @ self.item_matrix().T, atol=1e-4):
            raise _refused(name, "its scores are no dot products of a state with item vectors")


class ItemVocabulary:
    """What a backbone may ask of a dataset, and all that `load` knows of one: the number of items, padding included."""

    def __init__(self, n_items, config):
        self.item_num, self.user_num = n_items, 1  # SINE reads the latter and makes nothing of it
        self.field2seqlen = {config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"]: config["MAX_ITEM_LIST_LENGTH"]}

    def num(self, field):
        return self.item_num


def sequential_models():
    """Names of RecBole's sequential recommenders."""
    return sorted(
        name for name, kind in vars(sequential_recommender).items() if isinstance(kind, type) and issubclass(kind, SequentialRecommender)
    )


@cache
def wrapped(name):
    """The backbone class over one of `sequential_models`, on the prefix path.

    Raises:
        UserError: its `forward` asks for more than a history.
    """
    model = getattr(sequential_recommender, name)
    inputs = list(inspect.signature(model.forward).parameters)[1:]
    if inputs not in (["item_seq"], ["item_seq", "item_seq_len"]):
        raise _refused(name, f"its forward takes {', '.join(inputs)}, and a request has item_seq and item_seq_len alone")
    return type(f"WholeHistory{name}", (WholeHistory, model), {"name": name, "takes_length": len(inputs) > 1, "__module__": __name__})


def check_backbone(backbone, config):
    """Try a backbone class on a vocabulary of a few items, before any data are read.

    Raises:
        UserError: it cannot be wrapped, or RecBole refuses its settings.
    """
    try:
        with torch.no_grad():
            trial = backbone(config, ItemVocabulary(_TRIAL_ITEMS, config)).to(config["device"]).eval()
            if isinstance(trial, WholeHistory):
                trial.try_out()
    except UserError:
        raise
    except Exception as error:  # whatever RecBole's constructors raise
        name = config["model"].removeprefix("DPR_")
        raise _refused(name, f"from its settings and a vocabulary of items it fails ({type(error).__name__}: {error})") from error


def _refused(name, why):
    return UserError(f"backbone '{name}' cannot be wrapped: {why}; docs/backbones.md lists those that can")
