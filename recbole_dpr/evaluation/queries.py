"""The evaluation set: SEQ, POS and NEG queries, a pure function of dataset, protocol keys and seed.

Legend: Q queries, K targets, N window.
"""

from dataclasses import dataclass

import numpy as np

from recbole_dpr.data import targets
from recbole_dpr.data.dataset import NO_ITEM, TEST, VALID
from recbole_dpr.prompts.bank import NO_PROMPT
from recbole_dpr.prompts.templates import NEGATIVE, POSITIVE

TASKS = ("SEQ", "POS", "NEG")
PROMPT_KINDS = {"SEQ": ("none",), "POS": ("category", "tag", "wish"), "NEG": ("category", "tag")}
PROTOCOL_KEYS = (
    *("eval_args", "drop_unseen_items", "windows", "eval_positions", "short_windows", "mask_history"),
    *("eval_neg_target", "eval_tag_form", "MAX_ITEM_LIST_LENGTH", "CATEGORY_FIELD", "CATEGORY_IGNORE", "prompt_templates", "seed"),
)

_BLOCK = 256  # queries looked at together: the [Q, V] table of seen items stays in a processor's cache


@dataclass(frozen=True, eq=False)
class QuerySet:
    """The queries of one task and window.

    Attributes:
        task: SEQ, POS or NEG.
        window: N, or None for SEQ.
        position: int64 [Q], absolute position of the immediate next item; the history is what lies before.
        targets: int64 [Q, K], padded with `NO_ITEM`.
        category: int64 [Q], asked for or to be avoided (0 for SEQ).
        spoken_of: int64 [Q], the item whose tag or wish makes the prompt: the target (POS), the next item (NEG).
        draws: float64 [Q, 2] in [0, 1): which template, and which of the item's phrases.
    """

    task: str
    window: int | None
    position: np.ndarray
    targets: np.ndarray
    category: np.ndarray
    spoken_of: np.ndarray
    draws: np.ndarray

    def __len__(self):
        return len(self.position)

    @property
    def intent(self):
        return NEGATIVE if self.task == "NEG" else POSITIVE

    def take(self, rows):
        """The same queries at these rows only."""
        arrays = (getattr(self, name)[rows] for name in ("position", "targets", "category", "spoken_of", "draws"))
        return QuerySet(self.task, self.window, *arrays)


def build_queries(sequences, config, part=TEST, windows=None):
    """All query sets of a split part: SEQ, then POS and NEG for each window.

    Args:
        sequences: Sequences.
        config: the protocol keys of properties/dpr.yaml.
        part: TEST or VALID.
        windows: list of N; default the key `windows`.

    Returns:
        list of QuerySet.
    """
    position = evaluated_positions(sequences, config["eval_positions"], part)
    sets = [_seq(sequences, config, position, part)]
    for n in windows or config["windows"]:
        room = sequences.part_end[position] - position
        inside = position if config["short_windows"] else position[room >= n]
        for task in ("POS", "NEG"):
            rng = np.random.default_rng([config["seed"], part, TASKS.index(task), n])
            if task == "POS":
                found = targets.positive_in_window(sequences, inside, n, rng)
            else:
                found = targets.negative(sequences, inside, n, rng, config["eval_neg_target"] == "nearest")
            at = inside[found.rows]
            spoken_of = found.items[:, 0] if task == "POS" else sequences.items[at]
            queries = QuerySet(task, n, at, found.items, found.category, spoken_of, rng.random((len(at), 2)))
            sets.append(reachable(sequences, config, queries))
    return sets


def evaluated_positions(sequences, which, part):
    """The positions of a split part that are asked about: int64 [P]; which: first (of every user), or all."""
    start, end = sequences.bounds(part)
    if which == "first":
        return start[(end > start) & (start > sequences.offsets[:-1])]
    position = np.arange(len(sequences.items))
    lengths = np.diff(sequences.offsets)
    inside = (position >= np.repeat(start, lengths)) & (position < np.repeat(end, lengths))
    return position[inside & (position > np.repeat(sequences.offsets[:-1], lengths))]


def _seq(sequences, config, position, part):
    zeros = np.zeros(len(position), dtype=np.int64)
    rng = np.random.default_rng([config["seed"], part, 0])
    queries = QuerySet("SEQ", None, position, sequences.items[position][:, None], zeros, zeros, rng.random((len(zeros), 2)))
    return reachable(sequences, config, queries)


def reachable(sequences, config, queries):
    """Without the targets that masking the history takes out of the ranking, and the queries left with none."""
    if not config["mask_history"]:
        return queries
    keep = np.zeros(queries.targets.shape, dtype=bool)
    seen = np.zeros((_BLOCK, sequences.n_items), dtype=bool)
    for start in range(0, len(queries), _BLOCK):
        part = slice(start, start + _BLOCK)
        items, history = queries.targets[part], sequences.seen(queries.position[part])
        seen[history] = True
        keep[part] = (items != NO_ITEM) & ~np.take_along_axis(seen[: len(items)], np.maximum(items, 0), axis=1)
        seen[history] = False  # these alone: the table is much larger than what is in it
    left = np.take_along_axis(np.where(keep, queries.targets, NO_ITEM), np.argsort(~keep, axis=1, kind="stable"), axis=1)
    arrays = (queries.position, left, queries.category, queries.spoken_of, queries.draws)
    return QuerySet(queries.task, queries.window, *arrays).take(keep.any(axis=1))


def prompts_for(bank, queries, kind, part, tag_form="template"):
    """The prompt of every query, of one kind.

    Test queries use the evaluation columns and templates; validation queries the validation ones. There are no
    validation tags: validation by tag quotes a training tag, and names it so that it can be left out of the item.

    Args:
        bank: PromptBank; texts that it does not know yet are added, so ask before it is embedded.
        kind: category, tag or wish.
        part: TEST or VALID.
        tag_form: template, or bare: a tag as it stands.

    Returns:
        prompt: int64 [Q] rows of the prompt table, `NO_PROMPT` where the item has no such phrase;
        own: int64 [Q] rows of the training phrase that the prompt repeats, else `NO_PROMPT`.
    """
    pool = "valid" if part == VALID else "eval"
    nothing = np.full(len(queries), NO_PROMPT)
    if kind != "wish":
        template = (queries.draws[:, 0] * bank.templates.size(kind, queries.intent, pool)).astype(np.int64)
    if kind == "category":
        return bank.category_rows(queries.intent, pool, queries.category, template), nothing
    if kind == "tag":
        columns = "train" if part == VALID else "eval"
        tags = bank.texts.tags[columns]
        which = (queries.draws[:, 1] * tags.shape[1]).astype(np.int64)
        tags = tags[queries.spoken_of, which]
        rows = bank.rows(tags) if tag_form == "bare" else bank.tag_rows(queries.intent, pool, tags, template)
        return rows, bank.phrase[queries.spoken_of, which] if part == VALID else nothing
    wishes = bank.texts.wishes[pool]
    which = (queries.draws[:, 1] * wishes.shape[1]).astype(np.int64)
    return bank.rows(wishes[queries.spoken_of, which]), nothing
