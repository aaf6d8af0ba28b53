"""A RecBole dataset -> one flat array of items with user offsets and split points.

Legend: U users, I interactions, V items (id 0 is RecBole's padding item), C categories.

RecBole's SequentialDataset writes one padded row per prefix; here a user's history is a slice of one
array, so memory is O(I) whatever the maximum history length.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.utils import FeatureSource, FeatureType

from recbole_dpr.compat import parsing_in_c
from recbole_dpr.errors import UserError

TRAIN, VALID, TEST = 0, 1, 2
NO_ITEM = -1  # padding of target arrays; 0 is RecBole's padding item


def part_sizes(n_targets, split):
    """Sizes of the train, validation and test parts of users with `n_targets` prediction targets each.

    The same rounding as RecBole's `Dataset._calcu_split_ids` (ratio) and `_split_index_by_leave_one_out`
    (`LS: valid_and_test`), for all users at once.

    Args:
        n_targets: int array [U]; RecBole's sequential splits count targets, and the first interaction is none.
        split: RecBole's `eval_args.split`.

    Returns:
        int array [U, 3].
    """
    n_targets = np.asarray(n_targets)
    if "LS" in split:
        test = (n_targets > 1).astype(np.int64)
        valid = (n_targets > 2).astype(np.int64)
        return np.stack([n_targets - valid - test, valid, test], axis=1)
    ratios = np.asarray(split["RS"], dtype=np.float64)
    ratios = ratios / ratios.sum()
    sizes = (ratios * n_targets[:, None]).astype(np.int64)
    sizes[:, 0] = n_targets - sizes[:, 1:].sum(axis=1)
    for part in (TEST, VALID):  # a share that rounds to nothing takes one target from training, test first
        short = (sizes[:, 0] > 1) & (0 < ratios[part] * n_targets) & (ratios[part] * n_targets < 1)
        sizes[:, part] += short
        sizes[:, 0] -= short
    return sizes


class ChronologicalSplit:
    """Mixin for RecBole dataset classes: exact time order, the per-user split, no item unseen in training.

    RecBole keeps timestamps as float32, whose steps are 64 seconds at today's epoch: sorted by them, half of
    ml-1m changes places. Rows are therefore put in order here, on the float64 column, before RecBole's own
    stable sort, which then leaves them alone. RecBole also reads and counts interactions one by one in Python: here
    that is done in arrays, with the same result.
    """

    def _load_feat(self, filepath, source):
        """RecBole's own, but interactions are parsed in C, and their tokens become categories: a code per row, no string."""
        if source is not FeatureSource.INTERACTION:
            return super()._load_feat(filepath, source)
        with parsing_in_c():
            feat = super()._load_feat(filepath, source)
        return feat.astype({field: "category" for field in feat if self.field2type[field] is FeatureType.TOKEN})

    def _filter_by_inter_num(self):
        """RecBole's k-core filter over arrays; what .item and .user files say of who is gone leaves in `_data_filtering`."""
        columns = []
        keep, kept = np.ones(len(self.inter_feat), dtype=bool), None
        for field, key in ((self.uid_field, "user_inter_num_interval"), (self.iid_field, "item_inter_num_interval")):
            codes, intervals = _codes(self.inter_feat[field]), self._parse_intervals_str(self.config[key])
            keep &= codes >= 0  # RecBole overlooks some rows without an item where others are without a user
            if intervals:
                columns.append((codes, intervals))
        while kept != (kept := np.count_nonzero(keep)):
            # both counted before either goes, as RecBole does: with an upper bound it matters
            within = [self._within_intervals(np.bincount(codes[keep], minlength=codes.max() + 1), intervals) for codes, intervals in columns]
            for (codes, _), inside in zip(columns, within):
                keep &= inside[codes]
        self.inter_feat = self.inter_feat[keep]

    def _remap(self, remap_list):
        """RecBole's, on every token of an interaction column once, in the order in which they first come: ids are the same."""
        columns, short = [], []
        for feat, field, ftype in remap_list:
            if feat is self.inter_feat and ftype is FeatureType.TOKEN:
                tokens = feat[field].astype("category").cat
                found = pd.unique(tokens.codes)
                found = found[found >= 0]
                columns.append((field, tokens, found, pd.DataFrame({field: tokens.categories[found]})))
                feat = columns[-1][-1]
            short.append((feat, field, ftype))
        super()._remap(short)
        for field, tokens, found, once in columns:
            ids = np.zeros(len(tokens.categories) + 1, dtype=np.int64)  # the last one is for no token, code -1
            ids[found] = once[field]
            self.inter_feat[field] = ids[tokens.codes]

    def _data_filtering(self):
        super()._data_filtering()
        users, items = _codes(self.inter_feat[self.uid_field]), _codes(self.inter_feat[self.iid_field])
        order = np.lexsort((self.inter_feat[self.time_field], users))
        users, items = users[order], items[order]
        starts = np.flatnonzero(np.append(True, users[1:] != users[:-1]))
        lengths = np.diff(np.append(starts, len(users)))
        sizes = part_sizes(lengths - 1, self.config["eval_args"]["split"])
        rank = np.arange(len(users)) - np.repeat(starts, lengths)
        # the first interaction of a user is history, never a target: it belongs to training
        train_end = sizes[:, TRAIN] + 1
        parts = (rank >= np.repeat(train_end, lengths)).astype(np.int8) + (rank >= np.repeat(train_end + sizes[:, VALID], lengths))

        keep = np.ones(len(users), dtype=bool)
        if self.config["drop_unseen_items"]:
            seen = np.zeros(items.max() + 1, dtype=bool)
            seen[items[parts == TRAIN]] = True
            keep = seen[items]
        self.inter_feat = self.inter_feat.take(order[keep]).reset_index(drop=True)
        self.parts = parts[keep]
        # rows of .item and .user files without interactions would get ids too: the vocabulary is what was seen
        for field, name in ((self.iid_field, "item_feat"), (self.uid_field, "user_feat")):
            feat = getattr(self, name)
            if feat is not None:
                seen = feat[field].isin(self.inter_feat[field].unique())
                setattr(self, name, feat[seen].reset_index(drop=True))

    def build(self):
        """RecBole's train, validation and test datasets, cut at our split points.

        Returns:
            list of three datasets of this class.
        """
        users = self.inter_feat[self.uid_field].to_numpy()
        parts = self.parts
        if isinstance(self, SequentialDataset):  # has one row per target: all interactions but a user's first
            parts = parts[np.flatnonzero(np.append(False, users[1:] == users[:-1]))]
        self._change_feat_format()
        return [self.copy(self.inter_feat[np.flatnonzero(parts == part)]) for part in (TRAIN, VALID, TEST)]


def _codes(tokens):
    """A token column as numbers that sort as the tokens do: int [I]."""
    return tokens.astype("category").cat.codes.to_numpy()


class FlatDataset(ChronologicalSplit, Dataset):
    """RecBole's general Dataset (no prefix rows) with the chronological split."""


class PrefixDataset(ChronologicalSplit, SequentialDataset):
    """RecBole's SequentialDataset with the chronological split, for RecBole's own sequential models."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """Every user's items in time order, and what is known of the items.

    Attributes:
        items: int64 [I], users one after another, each in time order.
        offsets: int64 [U + 1]; user u's items are `items[offsets[u]:offsets[u + 1]]`.
        train_end, valid_end: int64 [U], absolute positions: training is `[offsets[u], train_end[u])`,
            validation `[train_end[u], valid_end[u])`, test `[valid_end[u], offsets[u + 1])`.
        categories: bool [V, C], row 0 (padding) all False.
        category_names: C names as the data file spells them.
        item_tokens: V external ids.
        titles, years: V strings each, "" where the data have none.
        user_tokens: U external ids.
    """

    items: np.ndarray
    offsets: np.ndarray
    train_end: np.ndarray
    valid_end: np.ndarray
    categories: np.ndarray
    category_names: tuple
    item_tokens: np.ndarray
    titles: np.ndarray
    years: np.ndarray
    user_tokens: np.ndarray

    @property
    def n_items(self):
        """Size of the item vocabulary with the padding item, as RecBole counts it."""
        return len(self.item_tokens)

    @property
    def n_users(self):
        return len(self.user_tokens)

    @cached_property
    def category_bits(self):
        """uint8 [V, C / 8]: `categories`, eight to a byte."""
        return np.packbits(self.categories, axis=1)

    @cached_property
    def part_end(self):
        """int64 [I]: for every position, the end of the split part that it lies in."""
        cuts = np.stack([self.offsets[:-1], self.train_end, self.valid_end, self.offsets[1:]], axis=1)  # [U, 4]
        return np.repeat(cuts[:, 1:].ravel(), np.diff(cuts, axis=1).ravel())

    @cached_property
    def user_of(self):
        """int64 [I]: the user of every position."""
        return np.repeat(np.arange(self.n_users), np.diff(self.offsets))

    def bounds(self, part):
        """Start and end of a split part, each int64 [U]."""
        cuts = (self.offsets[:-1], self.train_end, self.valid_end, self.offsets[1:])
        return cuts[part], cuts[part + 1]

    def histories(self, positions, max_length):
        """The items before each position, left-aligned as RecBole's models expect.

        Args:
            positions: int array [Q] of absolute positions.
            max_length: histories keep their last `max_length` items.

        Returns:
            item_seq int64 [Q, L] padded with 0 on the right, L = the longest history here (at least 1);
            lengths int64 [Q].
        """
        lengths = self.history_lengths(positions, max_length)
        steps = np.arange(max(1, lengths.max(initial=1)))
        index = np.minimum((positions - lengths)[:, None] + steps, len(self.items) - 1)  # [Q, L]
        return np.where(steps < lengths[:, None], self.items[index], 0), lengths

    def history_lengths(self, positions, max_length):
        """How many items `histories` has before each position: int64 [Q]."""
        positions = np.asarray(positions)
        return np.minimum(positions - self.offsets[self.user_of[positions]], max_length)

    def seen(self, positions):
        """All items before each position (whatever their number), for masking.

        Returns:
            rows, items: int64 [S] each; item `items[s]` was seen before query `rows[s]`.
        """
        positions = np.asarray(positions)
        start = self.offsets[self.user_of[positions]]
        return ranges_of(start, positions - start, self.items)

    def stats(self):
        """The counts that `metrics.json` reports as `dataset_stats`."""
        sizes = [int((end - start).sum()) for start, end in map(self.bounds, (TRAIN, VALID, TEST))]
        return {
            "users": self.n_users,
            "items": self.n_items - 1,
            "interactions": len(self.items),
            **dict(zip(("train", "valid", "test"), sizes)),
        }


def ranges_of(starts, lengths, values):
    """Concatenated slices `values[starts[q]:starts[q] + lengths[q]]`: (row of each element, element)."""
    rows = np.repeat(np.arange(len(starts)), lengths)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return rows, values[np.repeat(starts, lengths) + within]


def build_sequences(dataset):
    """The flat form of a `FlatDataset` that RecBole has read and filtered (and not yet built).

    Raises:
        UserError: the dataset has no item categories, or nothing is left to evaluate.
    """
    config = dataset.config
    users = dataset.inter_feat[dataset.uid_field].to_numpy()
    starts = np.flatnonzero(np.append(True, users[1:] != users[:-1]))
    offsets = np.append(starts, len(users))
    counts = np.stack([np.add.reduceat(dataset.parts == part, starts) for part in (TRAIN, VALID)])
    train_end = starts + counts[0]
    categories, names = _categories(dataset, config)
    sequences = Sequences(
        items=dataset.inter_feat[dataset.iid_field].to_numpy().astype(np.int64),
        offsets=offsets,
        train_end=train_end,
        valid_end=train_end + counts[1],
        categories=categories,
        category_names=names,
        item_tokens=np.asarray(dataset.field2id_token[dataset.iid_field], dtype=str),
        titles=_texts(dataset, config["TITLE_FIELD"]),
        years=_texts(dataset, config["YEAR_FIELD"]),
        user_tokens=np.asarray(dataset.field2id_token[dataset.uid_field], dtype=str)[users[starts]],
    )
    if not sequences.stats()["test"]:
        raise UserError(f"dataset '{dataset.dataset_name}': no user has enough interactions for a test part; see eval_args")
    return sequences


def _categories(dataset, config):
    """bool [V, C] and the C names, from a token or token_seq field of the .item file."""
    field, ignored = config["CATEGORY_FIELD"], set(config["CATEGORY_IGNORE"] or ())
    fields = [] if dataset.item_feat is None else [f for f in dataset.item_feat if f != dataset.iid_field]
    if field not in fields:
        raise UserError(
            f"dataset '{dataset.dataset_name}': no item category field '{field}' (item fields loaded: "
            f"{', '.join(fields) or 'none'}); name one with --CATEGORY_FIELD= and load it with load_col"
        )
    tokens = [str(t) for t in dataset.field2id_token[field]]
    values = dataset.item_feat[field].tolist()  # [V] ids, or arrays of ids
    lengths = np.array([np.size(v) for v in values])
    rows = np.repeat(np.arange(len(values)), lengths)
    table = np.zeros((len(values), len(tokens)), dtype=bool)
    table[rows, np.concatenate([np.ravel(v) for v in values]).astype(np.int64)] = True
    table[0] = False
    used = [c for c in range(1, len(tokens)) if table[:, c].any() and tokens[c] not in ignored]
    if not used:
        raise UserError(
            f"dataset '{dataset.dataset_name}': field '{field}' names no category of any item; "
            "name another with --CATEGORY_FIELD="
        )
    return table[:, used], tuple(tokens[c] for c in used)


def _texts(dataset, field):
    """V texts: the words of a token or token_seq field of the .item file; "" where the data have none."""
    n_items = dataset.item_num
    if not field or dataset.item_feat is None or field not in dataset.item_feat:
        return np.full(n_items, "", dtype=object)
    words = dataset.field2id_token[field]
    return np.array([" ".join(words[int(i)] for i in np.ravel(ids) if i) for ids in dataset.item_feat[field].tolist()], dtype=object)


def check_files(config):
    """Fail early, in one line, where the dataset's files are missing or lack what the protocol needs.

    A dataset that is not there but that RecBole knows how to download is left to RecBole.
    """
    name, folder = config["dataset"], Path(config["data_path"])
    inter = folder / f"{name}.inter"
    if not inter.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"dataset '{name}': no file {inter.name} in {folder} (RecBole's atomic files are needed)")
        if name not in _downloadable():
            raise UserError(
                f"dataset '{name}': no folder {folder}, and RecBole has no download of that name; "
                "give the folder above it with --data_path="
            )
        return
    with open(inter, encoding=config["encoding"] or "utf-8") as f:
        header = [column.split(":")[0] for column in f.readline().rstrip("\n").split(config["field_separator"])]
    for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD"):
        if config[key] not in header:
            raise UserError(
                f"dataset '{name}': no field '{config[key]}' in {inter.name} (it has {', '.join(header)}); "
                f"name the right one with --{key}="
            )


def _downloadable():
    import recbole

    path = Path(recbole.__file__).parent / "properties" / "dataset" / "url.yaml"
    return set(yaml.safe_load(path.read_text()))
