"""Batches for training: packed sequences, every position a target, or sampled histories; and the prompts of a share of them.

Legend: B rows, T steps, N prompted positions, K targets.
"""

from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from recbole_dpr.data import targets
from recbole_dpr.data.dataset import TRAIN
from recbole_dpr.prompts.bank import NO_PROMPT
from recbole_dpr.prompts.templates import NEGATIVE, POSITIVE


@dataclass
class _Tensors:
    """A dataclass of tensors that moves between devices as RecBole's Interaction does."""

    def to(self, device):
        return type(self)(**{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})


def _moved(value, device):
    if isinstance(value, list):
        return [v.to(device) for v in value]
    return value.to(device) if hasattr(value, "to") else value


@dataclass
class PromptedTargets(_Tensors):
    """Targets of one intent.

    Attributes:
        intent: POSITIVE or NEGATIVE.
        rows: int64 [N] into the batch's flattened [B * T] positions.
        targets: int64 [N, K], padded with `NO_ITEM`.
        prompt: int64 [N] rows of the prompt table.
        own_item: int64 [N]: the item that the prompt was written of, or 0.
        own_number: int64 [N]: which of that item's phrases (column of `PromptBank.phrase`) the prompt repeats, or `NO_PROMPT`.
        weight: of the mean over these rows in the loss: 1, or in a part of a batch the share of its rows.
    """

    intent: int
    rows: torch.Tensor
    targets: torch.Tensor
    prompt: torch.Tensor
    own_item: torch.Tensor
    own_number: torch.Tensor
    weight: float = field(default=1.0, kw_only=True)

    def take(self, order):
        """The rows in another order, int64 [N]."""
        by_row = ("rows", "targets", "prompt", "own_item", "own_number")
        return replace(self, **{name: getattr(self, name)[order] for name in by_row})


@dataclass
class PackedBatch(_Tensors):
    """Sequences and the targets at their positions.

    Attributes:
        item_seq: int64 [B, T], left-aligned, padded with 0.
        rows: int64 [M], the real positions in the flattened [B * T].
        targets: int64 [M], the next item at each.
        prompted: list of PromptedTargets.
        weight: of the mean over these rows in the loss, as of PromptedTargets.
    """

    item_seq: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    prompted: list
    weight: float = field(default=1.0, kw_only=True)

    @property
    def width(self):
        """Positions of a sequence in the flattened batch."""
        return self.item_seq.shape[1]

    def part(self, number, n_parts):
        """Every n-th sequence: the means of all parts, by their weights, sum up to the batch's."""
        prompted = [self._of_part(targets, number, n_parts) for targets in self.prompted]
        return replace(self._of_part(self, number, n_parts), item_seq=self.item_seq[number::n_parts], prompted=prompted)

    def _of_part(self, whole, number, n_parts):
        """The rows of a part, of this batch or of its PromptedTargets."""
        sequence = whole.rows // self.width
        mine = torch.nonzero(sequence % n_parts == number).squeeze(1)
        by_row = {f.name: getattr(whole, f.name) for f in fields(whole) if f.name != "item_seq"}
        kept = {name: value[mine] for name, value in by_row.items() if isinstance(value, torch.Tensor)}
        kept["rows"] = sequence[mine] // n_parts * self.width + whole.rows[mine] % self.width
        return replace(whole, **kept, weight=len(mine) / max(1, len(whole.rows)))


@dataclass
class PrefixBatch(PackedBatch):
    """Histories, each with the one target behind it: `item_seq` is [B, T], `rows` are 0 … B - 1.

    Attributes:
        lengths: int64 [B], items of each history.
    """

    lengths: torch.Tensor

    @property
    def width(self):
        """A history has one state."""
        return 1


# widths of batches are multiples of it: oneDNN makes and keeps a kernel for every shape of a bfloat16 product, and with all
# widths a run spent more on that than on padding, and gigabytes
_WIDTHS = 8


def _wide(length, max_length):
    """The width of a batch whose longest row has `length` items."""
    return min(-(-length // _WIDTHS) * _WIDTHS, max_length)


def in_few_widths(item_seq, max_length):
    """Histories int64 [B, T], padded with 0 on the right, at a width that other batches have too, of at most `max_length`."""
    return np.pad(item_seq, ((0, 0), (0, _wide(item_seq.shape[1], max_length) - item_seq.shape[1])))


def _stretches(sequences, max_length):
    """The training part cut into stretches of at most `max_length` inputs of one user: starts and lengths, int64 [R] each."""
    start, end = sequences.bounds(TRAIN)
    n_inputs = np.maximum(end - start - 1, 0)  # the last item of the part is a target only
    pieces = -(-n_inputs // max_length)
    user = np.repeat(np.arange(sequences.n_users), pieces)
    nth = np.arange(len(user)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return start[user] + nth * max_length, np.minimum(n_inputs[user] - nth * max_length, max_length)


class PackedLoader:
    """Training batches of whole sequences; RecBole's Trainer iterates it as it does its own loaders.

    A user's training part is cut into stretches of at most `max_length` inputs, so each of its positions is a
    target exactly once in an epoch. Stretches of like length share a batch (little padding); a batch holds at
    most `batch_size` positions, padding included. What an epoch draws depends on (seed, epoch) alone.

    Args:
        sequences: Sequences.
        max_length: MAX_ITEM_LIST_LENGTH.
        batch_size: positions of a batch.
        seed: int or tuple of ints.
        prompts: TrainingPrompts, or None for next-item targets alone.
    """

    def __init__(self, sequences, max_length, batch_size, seed, prompts=None):
        self.sequences, self.max_length, self.batch_size = sequences, max_length, batch_size
        self._seed, self._prompts, self.epoch = np.atleast_1d(seed).tolist(), prompts, 0
        self.starts, self.lengths = _stretches(sequences, max_length)
        self._n_batches = len(self._cut(np.argsort(self.lengths)))

    def __len__(self):
        return self._n_batches  # of the plain order; an epoch's own may differ by a few

    def _cut(self, order):
        """Batches of consecutive rows of `order` with at most `batch_size` positions, padding included."""
        batches, batch, longest = [], [], 0
        for row, length in zip(order.tolist(), self.lengths[order].tolist()):
            if batch and (len(batch) + 1) * _wide(max(longest, length), self.max_length) > self.batch_size:
                batches.append(np.array(batch))
                batch, longest = [], 0
            batch.append(row)
            longest = max(longest, length)
        return [*batches, np.array(batch)] if batch else batches

    def __iter__(self):
        rng = np.random.default_rng([*self._seed, self.epoch])
        # like lengths side by side, with a little noise so that each epoch has other neighbours
        batches = self._cut(np.argsort(self.lengths * rng.uniform(0.95, 1.05, len(self.lengths))))
        for index in rng.permutation(len(batches)):
            yield self._batch(batches[index], rng)

    def _batch(self, rows, rng):
        lengths = self.lengths[rows]
        steps = np.arange(_wide(lengths.max(), self.max_length))
        position = self.starts[rows][:, None] + steps  # [B, T] of the input; its target is the next one
        real = steps < lengths[:, None]
        item_seq = np.where(real, self.sequences.items[np.minimum(position, len(self.sequences.items) - 1)], 0)
        flat = np.flatnonzero(real)
        next_position = position.ravel()[flat] + 1
        prompted = self._prompts.draw(flat, next_position, rng) if self._prompts else []
        as_tensor = torch.from_numpy
        return PackedBatch(as_tensor(item_seq), as_tensor(flat), as_tensor(self.sequences.items[next_position]), prompted)


class PrefixLoader:
    """Training batches of sampled histories, for backbones whose states within a sequence cannot be used.

    In an epoch every stretch of at most `max_length` targets of a user gives `per_stretch` of them (all, where it has
    no more), each with the items before it. Histories of like length share a batch. What an epoch draws depends on
    (seed, epoch) alone.

    Args:
        sequences: Sequences.
        max_length: MAX_ITEM_LIST_LENGTH.
        per_stretch: prefixes_per_sequence.
        batch_size: prefix_batch_size, histories of a batch.
        seed, prompts: as for `PackedLoader`.
    """

    def __init__(self, sequences, max_length, per_stretch, batch_size, seed, prompts=None):
        self.sequences, self.max_length, self.per_stretch, self.batch_size = sequences, max_length, per_stretch, batch_size
        self._seed, self._prompts, self.epoch = np.atleast_1d(seed).tolist(), prompts, 0
        starts, lengths = _stretches(sequences, max_length)
        self._stretch = np.repeat(np.arange(len(lengths)), lengths)
        self._first = np.repeat(np.cumsum(lengths) - lengths, lengths)  # where each stretch begins in the arrays [I] here
        self._targets = np.repeat(starts + 1, lengths) + np.arange(len(self._stretch)) - self._first  # positions
        self._n_batches = -(-int(np.minimum(lengths, per_stretch).sum()) // batch_size)

    def __len__(self):
        return self._n_batches

    def __iter__(self):
        rng = np.random.default_rng([*self._seed, self.epoch])
        shuffled = np.lexsort((rng.random(len(self._stretch)), self._stretch))  # each stretch in an order of its own
        position = self._targets[shuffled[np.arange(len(shuffled)) - self._first < self.per_stretch]]
        history = np.minimum(position - self.sequences.offsets[self.sequences.user_of[position]], self.max_length)
        # like lengths side by side, with a little noise so that each epoch has other neighbours
        position = position[np.argsort(history * rng.uniform(0.95, 1.05, len(position)))]
        for index in rng.permutation(self._n_batches):
            yield self._batch(position[index * self.batch_size : (index + 1) * self.batch_size], rng)

    def _batch(self, position, rng):
        rows = np.arange(len(position))
        item_seq, lengths = self.sequences.histories(position, self.max_length)
        item_seq = in_few_widths(item_seq, self.max_length)
        prompted = self._prompts.draw(rows, position, rng) if self._prompts else []
        item_seq, rows, targets, lengths = map(torch.from_numpy, (item_seq, rows, self.sequences.items[position], lengths))
        return PrefixBatch(item_seq, rows, targets, prompted, lengths)


class TrainingPrompts:
    """Draws POS and NEG targets and their prompts for the positions of a batch.

    Args:
        sequences: Sequences.
        bank: PromptBank.
        config: the keys prompt_share, pos_target, neg_target, compliance_n, train_windows.
        shares: prompt kind -> share, for the kinds `category`, `tag`, `wish`.
    """

    def __init__(self, sequences, bank, config, shares):
        self.sequences, self.bank, self.config = sequences, bank, config
        self.kinds = [kind for kind, share in shares.items() if share > 0]
        share = np.array([shares[kind] for kind in self.kinds], dtype=np.float64)
        self.shares = share / share.sum()

    def draw(self, flat, position, rng):
        """Targets of both intents for a share of the positions.

        Args:
            flat: int64 [M] rows in the flattened batch.
            position: int64 [M] absolute positions of the next items.

        Returns:
            list of two PromptedTargets, POSITIVE and NEGATIVE (without rows where nothing complies).
        """
        config, result = self.config, []
        for intent in (POSITIVE, NEGATIVE):
            chosen = np.sort(rng.permutation(len(flat))[: max(1, round(config["prompt_share"] * len(flat)))])
            listed = config["pos_target" if intent == POSITIVE else "neg_target"] == "compliance"
            n = config["compliance_n"] if listed else rng.choice(config["train_windows"], len(chosen))
            if intent == NEGATIVE:
                found = targets.negative(self.sequences, position[chosen], n, rng, nearest=listed)
            elif listed:
                found = targets.positive_from_compliance_list(self.sequences, position[chosen], n, rng)
            else:
                found = targets.positive_in_window(self.sequences, position[chosen], n, rng)
            chosen = chosen[found.rows]
            spoken_of = found.items[:, 0] if intent == POSITIVE else self.sequences.items[position[chosen]]
            prompt, phrase = self._prompts(intent, found.category, spoken_of, rng)
            arrays = (flat[chosen], found.items, prompt, spoken_of, phrase)
            result.append(PromptedTargets(intent, *map(torch.from_numpy, arrays)))
        return result

    def _prompts(self, intent, category, item, rng):
        """A prompt for each target, of a kind drawn by the shares; where an item has none of it, of its category.

        Returns:
            rows of the prompt table, and which of the item's phrases the prompt repeats (or NO_PROMPT).
        """
        n, bank = len(item), self.bank
        kind = rng.choice(len(self.kinds), size=n, p=self.shares)
        prompt = bank.category[intent][category, rng.integers(bank.category[intent].shape[1], size=n)]
        phrase = np.full(n, NO_PROMPT)
        tag = rng.integers(bank.tag[intent].shape[1], size=n)
        form = rng.integers(bank.tag[intent].shape[2], size=n)
        wish = rng.integers(bank.wish.shape[1], size=n)
        for number, name in enumerate(self.kinds):
            if name == "category":
                continue
            if name == "wish" and intent == POSITIVE:
                rows, own = bank.wish[item, wish], bank.tag[intent].shape[1] + wish  # behind the tags
            else:  # wishes are all positive: a negative prompt of this share is a tag
                rows, own = bank.tag[intent][item, tag, form], tag
            use = (kind == number) & (rows != NO_PROMPT)
            prompt, phrase = np.where(use, rows, prompt), np.where(use, own, phrase)
        return prompt, phrase
