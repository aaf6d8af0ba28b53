"""Train the tagger that splits prompts into clauses (recbole_dpr/prompts/clause_tagger.py).

    python benchmarks/train_router.py --teacher_encoder=FOLDER --teacher=FILE [--teacher_epochs=3] [--epochs=4] [--seed=2026]
        [--start=FILE] [--without=STYLE,STYLE,...] [--output=FILE]

Two taggers are trained, on intents_train.tsv and intent_frames.txt of dataset/prompts and requests.tsv of dataset/movielens alone: a
teacher over a larger encoder, all-mpnet-base-v2 in FOLDER, and the one that is shipped, on the marks and on what the teacher makes of
the same texts (distillation: Hinton et al., arXiv:1503.02531, of label sequences). FILE is the teacher's, made if it is not there.
Without --teacher= the marks alone are learned. On one core, in bfloat16 where the hardware has it; files are written whole. --start= goes
on from a weights file. --without= leaves styles out of training and measures on them. Everything here was chosen that way, or on the
held-out files before the last, never on intents_heldout7.tsv. On another processor the weights differ a little.
"""

import hashlib
import random
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import router_teacher
import torch
from router import MEASURES, judge, read, scores
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from recbole_dpr.cli import parse_settings
from recbole_dpr.errors import UserError
from recbole_dpr.precision import compute_dtype
from recbole_dpr.prompts import clause_tagger
from recbole_dpr.prompts.clause_tagger import OUTSIDE, begin, collate, log_total
from recbole_dpr.prompts.templates import INTENTS, Templates
from recbole_dpr.resources import dataset_dir
from recbole_dpr.train.checkpoints import replacing

_BATCH = 48
_LEARNING_RATE, _HEAD_LEARNING_RATE, _WARM_UP, _WEIGHT_DECAY, _MAX_NORM = 1.5e-4, 1e-3, 0.1, 0.01, 1.0
_SOFT = 0.7  # weight of what the teacher says, beside the marks
_DROPOUT = 0.1  # of what attention and feed-forward add, as BERT has it
_HEAD = ("output.", "transitions")  # names of the parameters over the encoder
_AVERAGED_OVER = 50  # steps, about: what is kept is a moving average of the weights
# chances of each change to a training text
_SWAP, _JOIN, _CHATTER, _BARE, _TYPOS, _TYPO = 0.3, 0.15, 0.1, 0.15, 0.1, 0.03
_SLOT = re.compile(r"(.*?)\{([+-]?)(s?)\}")
_LINKS = (" ", " ", " ", "; ", ", ", " - ", ", and ", ", but ", " But ", " Also, ")


# --- texts as parts: [(text, "positive", "negative" or None for what is no clause), …]


def parts_of(text, clauses):
    found, at = [], 0
    for clause in clauses:
        start = text.index(clause.text, at)
        found += [(text[at:start], None), (clause.text, clause.intent)]
        at = start + len(clause.text)
    return [part for part in [*found, (text[at:], None)] if part[0]]


class Augmentation:
    """Training texts and frames -> texts that have their clauses at known places.

    Args:
        rows: [(parts, domain), …]; rng: random.Random.
    """

    def __init__(self, rows, rng):
        self.rows, self.rng, self.chatter = rows, rng, Templates("neutral").chatter
        self.clauses, self.domains = defaultdict(list), sorted({domain for _, domain in rows})
        for parts, domain in rows:
            for text, intent in parts:
                if intent:
                    self.clauses[domain, _form(text)].append(text)

    def __call__(self, parts, domain):
        rng, parts = self.rng, self._swapped(parts, domain)
        if rng.random() < _JOIN:
            parts = self._joined(parts, self._swapped(*rng.choice(self.rows)))
        if rng.random() < _CHATTER:
            parts = [(f"{rng.choice(self.chatter['before'])} ", None), *parts]
        if rng.random() < _CHATTER:
            parts = [*parts, (f" {rng.choice(self.chatter['after'])}", None)]
        draw = rng.random()
        if draw < _BARE / 2:  # without the last full stop, as many type
            parts = [*parts[:-1], (parts[-1][0].rstrip(".!? "), parts[-1][1])]
        elif draw < _BARE:
            parts = [(re.sub(r"[^\w\s]", "", text), intent) for text, intent in parts]
        if rng.random() < _TYPOS:
            parts = [(self._mistyped(text), intent) for text, intent in parts]
        return [part for part in parts if part[0]]

    def filled(self, frame):
        """The parts of a frame, with clauses of one domain in its slots."""
        found, domain = [], self.rng.choice(self.domains)
        for text, wanted, plural in _SLOT.findall(frame + "{}"):
            found.append((text, None))
            if wanted:
                forms = ("plural",) if plural else ("a", "the", "plural", "other")
                found.append((self.rng.choice(self.clauses[domain, self.rng.choice(forms)]), INTENTS[wanted == "-"]))
        return [part for part in found if part[0]]

    def _swapped(self, parts, domain):
        """With other clauses of the same form in place of some: what carries a clause tells its intent."""
        return [
            (self.rng.choice(self.clauses[domain, _form(text)]), intent) if domain and intent and self.rng.random() < _SWAP else (text, intent)
            for text, intent in parts
        ]

    def _joined(self, parts, others):
        link, (last, intent) = self.rng.choice(_LINKS), parts[-1]
        ended = re.search(r"[.!?…]['\")]?$", last)
        if link == " " and not ended:
            link = ". "
        elif link[0] in ",;" and ended and intent is None:
            parts = [*parts[:-1], (last.rstrip(".!?…"), None)]
        return [*parts, (link, None), *others]

    def _mistyped(self, text):
        letters = list(text)
        for at in range(len(letters) - 1):
            if letters[at].isalpha() and letters[at + 1].isalpha() and self.rng.random() < _TYPO:
                letters[at], letters[at + 1] = letters[at + 1], letters[at]
        return "".join(letters)


def _form(clause):
    """Clauses of one form can stand in each other's place."""
    first, *others = clause.lower().split()
    if first in ("a", "an", "one", "another"):
        return "a"
    if first in ("the", "something", "anything", "some", "any", "that", "this"):
        return first
    return "plural" if re.sub(r"\W", "", (others or [first])[-1]).endswith("s") else "ing" if first.endswith("ing") else "other"


def example(reader, parts):
    """(Words, labels) of a text's first window."""
    spans, at = [], 0
    for part, intent in parts:
        if intent:
            spans.append((at, at + len(part), INTENTS.index(intent)))
        at += len(part)
    window, labels, last = reader.windows("".join(part for part, _ in parts))[0], [], None
    for start, end in window.places:
        span = next((span for span in spans if span[0] <= start and end <= span[1]), None)
        labels.append(OUTSIDE if span is None else begin(span[2]) + (span == last))
        last = span
    return window, labels


@dataclass
class Plan:
    """What of a tagger is trained beside its head, and how.

    Attributes:
        layers: modules; dropped: those whose output meets dropout; rate: learning rate of the layers.
    """

    layers: list
    dropped: list
    rate: float


def plan_of(tagger):
    """All layers; the embeddings stay as they are."""
    return Plan(list(tagger.layers), [part for layer in tagger.layers for part in (layer.mixed, layer.narrow)], _LEARNING_RATE)


def train(reader, plan, rows, frames, epochs, seed, teacher=None):
    """{name: float32 tensor} of the parameters that were trained, averaged; the reader's tagger is left as trained.

    Args:
        reader: Reader; plan: Plan of its tagger; rows: as `router.read` gives them; frames: lines of intent_frames.txt.
        teacher: Reader whose tagger is listened to, or None.
    """
    torch.manual_seed(seed)
    rng, tagger = random.Random(seed), reader.tagger
    tagger.requires_grad_(False)
    for trained in (*plan.layers, tagger.output):
        trained.requires_grad_(True)
    tagger.transitions.requires_grad_(True)
    hooks = [part.register_forward_hook(lambda _, __, output: nn.functional.dropout(output, _DROPOUT)) for part in plan.dropped]
    # the pass may be in bfloat16, the steps are in float32
    master = {name: p.detach().clone() for name, p in tagger.named_parameters() if p.requires_grad}
    working = [p for p in tagger.to(compute_dtype("auto", torch.device("cpu"))).parameters() if p.requires_grad]
    averaged, weights = {name: p.clone() for name, p in master.items()}, list(master.values())
    rates = {False: plan.rate, True: _HEAD_LEARNING_RATE}
    groups = [{"params": [p for name, p in master.items() if name.startswith(_HEAD) == head], "lr": rate} for head, rate in rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=_WEIGHT_DECAY, fused=True)
    steps = -(-(len(rows) + len(frames)) // _BATCH) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, list(rates.values()), steps, pct_start=_WARM_UP)
    parts = [(parts_of(text, clauses), domain) for text, clauses, _, domain in rows]
    augment = Augmentation(parts, rng)
    for epoch in range(1, epochs + 1):
        texts = [augment(*own) for own in parts + [(augment.filled(frame), None) for frame in frames]]
        examples = [(text, *example(reader, text)) for text in texts]
        examples.sort(key=lambda own: len(own[1].pieces) * rng.uniform(0.8, 1.2))  # like lengths side by side
        batches = [examples[at : at + _BATCH] for at in range(0, len(examples), _BATCH)]
        rng.shuffle(batches)
        total, bar = 0.0, tqdm(batches, desc=f"epoch {epoch}/{epochs}")
        for count, batch in enumerate(bar, start=1):
            texts, windows, labels = zip(*batch)
            scores, lengths = tagger(*collate(windows)), torch.tensor(list(map(len, labels)))
            loss = tagger.loss(scores, nn.utils.rnn.pad_sequence(list(map(torch.tensor, labels)), batch_first=True), lengths)
            if teacher:
                loss = (1 - _SOFT) * loss + _SOFT * soft_loss(tagger, scores, lengths, *opinion(teacher, texts, lengths))
            loss.backward()
            for p, own in zip(weights, working):
                p.grad, own.grad = own.grad.float(), None
            nn.utils.clip_grad_norm_(weights, _MAX_NORM)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                torch._foreach_copy_(working, weights)
                torch._foreach_lerp_(list(averaged.values()), weights, 1 / _AVERAGED_OVER)
            total += loss.item()
            bar.set_postfix(loss=f"{total / count:.3f}")
    for hook in hooks:
        hook.remove()
    return averaged


def opinion(teacher, texts, lengths):
    """A teacher's probabilities of each label [B, W, L] and of each pair of a word's label and the one before it [B, W, L, L].

    Both are gradients of the log of the sum over all label sequences. Word pieces may be cut otherwise than the student's, words are not.

    Args:
        teacher: Reader; texts: B texts as parts; lengths: int64 [B] of their first windows in words.
    """
    windows = [teacher.windows("".join(part for part, _ in text))[0] for text in texts]
    if [len(window.first) for window in windows] != lengths.tolist():
        raise ValueError("the teacher cuts texts into other words than the student")
    with torch.no_grad():
        scores, steps = teacher.tagger(*collate(windows)), teacher.tagger.steps()
    scores, steps = scores.requires_grad_(), steps.expand(*scores.shape, -1).contiguous().requires_grad_()
    return torch.autograd.grad(log_total(scores, steps, lengths).sum(), (scores, steps))


def soft_loss(tagger, scores, lengths, labels, pairs):
    """Mean cross-entropy of the student's label sequences under a teacher's; arguments as `opinion` returns them."""
    steps = tagger.steps()
    expected = (labels * scores).sum() + (pairs * steps.masked_fill(tagger.barred < 0, 0.0)).sum()  # what is barred has probability 0
    return (log_total(scores, steps, lengths).sum() - expected) / len(scores)


def main(epochs=4, seed=2026, start=None, without="", output=clause_tagger.WEIGHTS, teacher=None, teacher_encoder=None, teacher_epochs=3):
    torch.set_num_threads(1)
    left_out = set(filter(None, without.split(",")))
    rows = read("intents_train") + read("requests", "movielens")
    frames = (dataset_dir() / "prompts" / "intent_frames.txt").read_text(encoding="utf-8").splitlines()
    corpus = [row for row in rows if row[2] not in left_out], frames
    taught = None
    if teacher:
        if not teacher_encoder:
            raise UserError("--teacher= needs --teacher_encoder=FOLDER of all-mpnet-base-v2")
        made_of = {"made_of": f"{hashlib.sha256(repr(corpus).encode()).hexdigest()}, seed {seed}, {teacher_epochs} epochs"}
        if not Path(teacher).exists():
            torch.manual_seed(seed)
            reader = router_teacher.untrained(teacher_encoder)
            trained = train(reader, Plan(*router_teacher.trained_parts(reader.tagger)), *corpus, teacher_epochs, seed)
            with replacing(teacher) as temporary:
                save_file({name: p.half() for name, p in trained.items()}, temporary, made_of)
        taught = router_teacher.load(teacher_encoder, teacher, made_of)
    torch.manual_seed(seed)  # of the head's first weights
    reader = clause_tagger.untrained()
    if start:
        clause_tagger.apply(reader.tagger, load_file(start))
    trained = train(reader, plan_of(reader.tagger), *corpus, epochs, seed, taught)
    with replacing(output) as temporary:
        save_file(clause_tagger.changes(clause_tagger.untrained().tagger, trained), temporary)
    print(f"written: {output}")
    if left_out:
        route = clause_tagger.load(output)
        judged = defaultdict(list)
        for text, clauses, style, _ in rows:
            if style in left_out:
                verdicts = judge(clauses, route(text))
                judged[style].append(verdicts)
                judged["all"].append(verdicts)
        for style, group in judged.items():
            found = scores(group)
            print(f"{style}: " + ", ".join(f"{name} {100 * found[name]:.1f}" for name in MEASURES if found[name] is not None))


if __name__ == "__main__":
    main(**parse_settings(sys.argv[1:], ("start", "without", "output", "teacher", "teacher_encoder")))
