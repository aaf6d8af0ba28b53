"""Sequences and splits: RecBole's own where RecBole is exact, chronological where it is not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.data.dataset import Dataset, SequentialDataset

import tiny
from recbole_dpr import materials
from recbole_dpr.config import make_config
from recbole_dpr.data.dataset import TEST, TRAIN, VALID, FlatDataset, PrefixDataset, build_sequences, part_sizes
from recbole_dpr.errors import UserError
from recbole_dpr.materials import read_dataset, read_sequences


def shuffle_rows(folder, timestamps):
    """Put the interactions of a tiny dataset in random order, with timestamps by a function of their rank."""
    path = next(folder.glob("*.inter"))
    head, *rows = path.read_text().splitlines()
    rows = ["\t".join([*row.split("\t")[:2], str(timestamps(rank))]) for rank, row in enumerate(rows)]
    np.random.default_rng(5).shuffle(rows)
    path.write_text("\n".join([head, *rows]) + "\n")


def config_of(tmp_path, **more):
    return make_config("DPR_SASRec", "tiny", (), tiny.settings(tmp_path, **more))


def plain_rows(config, part):
    """(user, history, next item) of every row of a part of RecBole's own SequentialDataset, external ids."""
    dataset = SequentialDataset(config)
    rows = dataset.build()[part].inter_feat
    items, users = dataset.field2id_token[dataset.iid_field], dataset.field2id_token[dataset.uid_field]
    return {
        (users[u], tuple(items[h[:n]]), items[t])
        for u, h, n, t in zip(rows["user_id"].numpy(), rows["item_id_list"].numpy(), rows["item_length"].numpy(), rows["item_id"].numpy())
    }


def our_rows(sequences, max_length, part):
    start, end = sequences.bounds(part)
    position = np.concatenate([np.arange(s, e) for s, e in zip(start, end)])
    position = position[position > sequences.offsets[sequences.user_of[position]]]
    item_seq, lengths = sequences.histories(position, max_length)
    tokens = sequences.item_tokens
    return {
        (sequences.user_tokens[sequences.user_of[p]], tuple(tokens[h[:n]]), tokens[sequences.items[p]])
        for p, h, n in zip(position, item_seq, lengths)
    }


@pytest.mark.parametrize("split", [{"RS": [0.8, 0.1, 0.1]}, {"RS": [0.6, 0.3, 0.1]}, {"LS": "valid_and_test"}])
def test_positions_and_histories_are_those_of_recbole(tmp_path, split):
    """Timestamps that float32 holds exactly, every item kept: RecBole's own dataset gives the same rows."""
    shuffle_rows(tiny.write(tmp_path), lambda rank: rank)
    args = {"split": split, "order": "TO", "group_by": "user", "mode": "full"}
    config = config_of(tmp_path, eval_args=args, drop_unseen_items=False)
    sequences = read_sequences(config)
    for part in (TRAIN, VALID, TEST):
        assert our_rows(sequences, config["MAX_ITEM_LIST_LENGTH"], part) == plain_rows(config, part)


class AsRecBoleReads(FlatDataset):
    """Ours with RecBole's own bodies: strings parsed in Python, interactions counted one by one."""

    _load_feat, _filter_by_inter_num, _remap = Dataset._load_feat, Dataset._filter_by_inter_num, Dataset._remap


FILTERS = [
    {},
    {"user_inter_num_interval": "[3,inf)", "item_inter_num_interval": "[3,inf)"},
    {"user_inter_num_interval": "(2,14]", "item_inter_num_interval": "[2,9);[12,inf)"},
    {"item_inter_num_interval": "[4,inf)", "user_inter_num_interval": None, "rm_dup_inter": "last", "val_interval": {"timestamp": "(3,inf)"}},
    {"filter_inter_by_user_or_item": False, "val_interval": {"shop": ["7", "07", "a"]}},
]


@pytest.mark.parametrize("filters", FILTERS)
def test_reading_gives_what_recboles_own_reading_gives(tmp_path, filters):
    """Users, items, ids and order, whatever the tokens look like."""
    folder = tiny.write(tmp_path)
    more = {"inter": ["user_id", "item_id", "timestamp", "shop"], "item": ["item_id", "title", "category"]}
    config = config_of(tmp_path, load_col=more, drop_unseen_items=False, **filters)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        names = np.array([f"{prefix}{n}" for prefix in ("", "0", "NA", " x", "é") for n in range(12)] + ["1e3", "1.0", "NA"])
        items = rng.permutation(names)[:30]
        (folder / "tiny.item").write_text(
            "item_id:token\ttitle:token_seq\tcategory:token_seq\n" + "".join(f"{i}\tFilm {n}\t{tiny.CATEGORIES[n % 4]}\n" for n, i in enumerate(items[:25]))
        )
        users = rng.choice(rng.permutation(names[:-1])[:25], 300)  # none is missing where items are: RecBole then drops the wrong rows
        times = rng.choice([0.1, 1.5, 3.0, 1e9 / 3, 1_700_000_001.25, 7.0], 300)
        rows = zip(users, rng.choice(items, 300), times, rng.choice(["7", "07", "a", "NA", ""], 300))
        (folder / "tiny.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\tshop:token\n" + "".join("\t".join(map(str, row)) + "\n" for row in rows))
        plain, ours = AsRecBoleReads(config), FlatDataset(config)
        np.testing.assert_array_equal(ours.inter_feat.to_numpy(), plain.inter_feat.to_numpy())
        for field in ("user_id", "item_id", "shop"):
            assert ours.field2id_token[field].tolist() == plain.field2id_token[field].tolist()
        theirs = build_sequences(plain)
        for name, value in vars(build_sequences(ours)).items():
            np.testing.assert_array_equal(value, getattr(theirs, name))


def test_what_was_read_comes_from_the_cache_next_time(tmp_path, monkeypatch):
    folder = tiny.write(tmp_path)
    read = []
    monkeypatch.setattr(materials, "read_dataset", lambda config: read.append(1) or read_dataset(config))

    def reading(**more):
        read.clear()
        return read_sequences(config_of(tmp_path, **more)), bool(read)

    first, was_read = reading()
    again, was_read_again = reading(MAX_ITEM_LIST_LENGTH=3)  # which reading does not depend on
    assert (was_read, was_read_again) == (True, False)
    for name, value in vars(first).items():
        np.testing.assert_array_equal(getattr(again, name), value)
        assert getattr(getattr(again, name), "dtype", None) == getattr(value, "dtype", None)
    assert reading(data_cache_dir=False)[1]
    assert reading(user_inter_num_interval="[35,inf)")[1]  # other settings
    path = folder / "tiny.inter"
    path.write_text(path.read_text().replace("u7\ti", "u8\ti", 1))  # other content of the same size
    other, was_read = reading()
    assert was_read and other.items.tolist() != first.items.tolist()


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content[:3000] + b"????" + content[3004:]])
def test_a_damaged_cache_is_made_anew(tmp_path, damage, caplog):
    tiny.write(tmp_path)
    first = read_sequences(config_of(tmp_path))
    (file,) = (tmp_path / "cache" / "data").glob("tiny-*.npz")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    np.testing.assert_array_equal(read_sequences(config_of(tmp_path)).items, first.items)
    assert "damaged" in caplog.text and file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_names_its_key(tmp_path):
    tiny.write(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data_cache_dir="):
        read_sequences(config_of(tmp_path, data_cache_dir=str(tmp_path / "file")))


def test_todays_timestamps_keep_their_order(tmp_path):
    """RecBole's float32 column has steps of 64 seconds at today's epoch; ours is exact."""
    shuffle_rows(tiny.write(tmp_path), lambda rank: 1_700_000_000 + rank)
    config = config_of(tmp_path, drop_unseen_items=False)
    sequences = read_sequences(config)
    exact = our_rows(sequences, config["MAX_ITEM_LIST_LENGTH"], TEST)
    assert exact != plain_rows(config, TEST)  # the reason for our own sort
    shuffle_rows(tiny.write(tmp_path, "again"), lambda rank: rank)
    again = make_config("DPR_SASRec", "again", (), tiny.settings(tmp_path, drop_unseen_items=False))
    assert exact == our_rows(read_sequences(again), config["MAX_ITEM_LIST_LENGTH"], TEST)


@pytest.mark.parametrize("dataset_class", [FlatDataset, PrefixDataset])
def test_recbole_parts_are_ours(tmp_path, dataset_class):
    """What RecBole's loaders get: the same targets, part by part, unseen items gone."""
    tiny.write(tmp_path, n_items=200, n_users=12)
    config = config_of(tmp_path)
    dataset = read_dataset(config, dataset_class)
    sequences = build_sequences(dataset)
    built = dataset.build()
    for part, start_end in zip(built, map(sequences.bounds, (TRAIN, VALID, TEST))):
        start, end = start_end
        if dataset_class is PrefixDataset:
            start = np.maximum(start, sequences.offsets[:-1] + 1)
        expected = np.concatenate([sequences.items[s:e] for s, e in zip(start, end)])
        np.testing.assert_array_equal(part.inter_feat["item_id"].numpy(), expected)


def test_unseen_items_leave_every_part(tmp_path):
    tiny.write(tmp_path, n_items=200, n_users=12)  # so sparse that some items come only late
    kept, all_items = (read_sequences(config_of(tmp_path, drop_unseen_items=flag)) for flag in (True, False))
    start, end = kept.bounds(TRAIN)
    seen = set(np.concatenate([kept.items[s:e] for s, e in zip(start, end)]))
    assert set(kept.items) == seen == set(range(1, kept.n_items))
    assert kept.n_items < all_items.n_items
    assert kept.stats()["items"] == kept.n_items - 1


def test_items_find_their_categories_and_titles(tmp_path):
    tiny.write(tmp_path)
    sequences = read_sequences(config_of(tmp_path))
    by_hand = dict(line.split("\t")[0::2] for line in (tmp_path / "tiny" / "tiny.item").read_text().splitlines()[1:])
    for row in range(1, sequences.n_items):
        token = sequences.item_tokens[row]
        names = {sequences.category_names[c] for c in np.flatnonzero(sequences.categories[row])}
        assert names == set(by_hand[token].split())
        assert sequences.titles[row] == f"Film number {token[1:]}"
    assert not sequences.categories[0].any()


@given(st.lists(st.integers(0, 400), min_size=1, max_size=20), st.sampled_from([[0.8, 0.1, 0.1], [8, 1, 1], [0.5, 0.2, 0.3], [0.98, 0.01, 0.01]]))
def test_part_sizes_are_recboles(n_targets, ratios):
    total = sum(ratios)
    sizes = part_sizes(np.array(n_targets), {"RS": ratios})
    for n, row in zip(n_targets, sizes):
        cuts = [0, *Dataset._calcu_split_ids(None, tot=n, ratios=[r / total for r in ratios]), n]
        assert row.tolist() == np.diff(cuts).tolist()


def test_seen_and_histories(tmp_path):
    tiny.write(tmp_path)
    sequences = read_sequences(config_of(tmp_path))
    position = sequences.valid_end[:5]
    item_seq, lengths = sequences.histories(position, 4)
    rows, items = sequences.seen(position)
    for row, p in enumerate(position):
        history = sequences.items[sequences.offsets[row] : p]
        assert item_seq[row, : lengths[row]].tolist() == history[-4:].tolist()
        assert items[rows == row].tolist() == history.tolist()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"CATEGORY_FIELD": "genre"}, "no item category field 'genre'"),
        ({"TIME_FIELD": "when"}, "no field 'when'"),
        ({"ITEM_ID_FIELD": "product"}, "no field 'product'"),
        ({"data_path": "/no/such/folder"}, "--data_path="),
        ({"CATEGORY_IGNORE": list(tiny.CATEGORIES)}, "names no category"),
        ({"user_inter_num_interval": "[1000,inf)"}, "empty"),
    ],
)
def test_what_is_missing_is_said_in_one_line(tmp_path, more, said):
    tiny.write(tmp_path)
    with pytest.raises(UserError, match=said.replace("[", r"\[")) as error:
        read_sequences(config_of(tmp_path, **more))
    assert "\n" not in str(error.value)


def test_missing_inter_file(tmp_path):
    tiny.write(tmp_path)
    (tmp_path / "tiny" / "tiny.inter").unlink()
    with pytest.raises(UserError, match="no file tiny.inter"):
        read_sequences(config_of(tmp_path))


def test_build_sequences_reads_a_filtered_dataset(tmp_path):
    """RecBole's own filters apply before the split."""
    tiny.write(tmp_path)
    config = config_of(tmp_path, item_inter_num_interval="[25,inf)")
    sequences = build_sequences(FlatDataset(config))
    assert 0 < sequences.n_items < 81
    assert np.bincount(sequences.items)[1:].min() >= 24  # an item may lose its users' unseen neighbours, not itself
