"""Train the tagger that splits prompts into clauses (recbole_dpr/prompts/clause_tagger.py).

    python benchmarks/train_router.py [--epochs=5] [--seed=2026] [--start=FILE] [--without=STYLE,STYLE,...] [--output=FILE]

Trains on intents_train.tsv and intent_frames.txt of dataset/prompts and requests.tsv of dataset/movielens alone, on one core (in bfloat16 where the
hardware has it), and writes the weights file whole. --start= goes on from a weights file, at lower learning rates. --without= leaves
styles out of training and measures on them. Everything here was chosen that way, or on the held-out files before the last, never on
intents_heldout6.tsv. On another processor the weights differ a little.
"""

import random
import re
import sys
import time
from collections import defaultdict

import torch
from router import MEASURES, judge, read, scores
from safetensors.torch import load_file, save_file
from torch import nn

from recbole_dpr.cli import parse_settings
from recbole_dpr.precision import compute_dtype
from recbole_dpr.prompts import clause_tagger
from recbole_dpr.prompts.clause_tagger import OUTSIDE, begin, collate
from recbole_dpr.prompts.templates import INTENTS, Templates
from recbole_dpr.resources import dataset_dir
from recbole_dpr.train.checkpoints import replacing

_BATCH = 48
_LEARNING_RATE, _HEAD_LEARNING_RATE, _WARM_UP, _WEIGHT_DECAY, _MAX_NORM = 1.5e-4, 2e-3, 0.1, 0.01, 1.0
_GOING_ON = 0.5  # of the learning rates, where training starts from weights that were trained before
_DROPOUT = 0.1  # of what attention and feed-forward add, as BERT has it
_FROZEN = 2  # layers that stay as they are, with the embeddings
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


def train(reader, rows, frames, epochs, seed, start=None):
    """{name: float32 tensor} of the parameters that were trained, averaged; the reader's tagger is left as trained.

    Args:
        reader: Reader, untrained; rows: as `router.read` gives them; frames: lines of intent_frames.txt.
        start: a weights file to go on from, or None.
    """
    torch.manual_seed(seed)
    rng, tagger = random.Random(seed), reader.tagger
    nn.init.normal_(tagger.output.weight, std=0.02)
    nn.init.zeros_(tagger.output.bias)
    rates = _LEARNING_RATE, _HEAD_LEARNING_RATE
    if start:
        clause_tagger.apply(tagger, load_file(start))
        rates = [_GOING_ON * rate for rate in rates]
    tagger.requires_grad_(False)
    for trained in (tagger.layers[_FROZEN:], tagger.output):
        trained.requires_grad_(True)
    tagger.transitions.requires_grad_(True)
    for layer in tagger.layers:
        for part in (layer.mixed, layer.narrow):
            part.register_forward_hook(lambda _, __, output: nn.functional.dropout(output, _DROPOUT))
    # the pass may be in bfloat16, the steps are in float32
    master = {name: p.detach().clone() for name, p in tagger.named_parameters() if p.requires_grad}
    working = [p for p in tagger.to(compute_dtype("auto", torch.device("cpu"))).parameters() if p.requires_grad]
    averaged, weights = {name: p.clone() for name, p in master.items()}, list(master.values())
    groups = [([p for name, p in master.items() if name.startswith("layers") == body], rate) for body, rate in zip((True, False), rates)]
    optimizer = torch.optim.AdamW([{"params": params, "lr": rate} for params, rate in groups], weight_decay=_WEIGHT_DECAY, fused=True)
    steps = -(-(len(rows) + len(frames)) // _BATCH) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [rate for _, rate in groups], steps, pct_start=_WARM_UP)
    parts = [(parts_of(text, clauses), domain) for text, clauses, _, domain in rows]
    augment, start = Augmentation(parts, rng), time.time()
    for epoch in range(1, epochs + 1):
        texts = parts + [(augment.filled(frame), None) for frame in frames]
        examples = [example(reader, augment(*own)) for own in texts]
        examples.sort(key=lambda own: len(own[0].pieces) * rng.uniform(0.8, 1.2))  # like lengths side by side
        batches = [examples[at : at + _BATCH] for at in range(0, len(examples), _BATCH)]
        rng.shuffle(batches)
        losses = []
        for batch in batches:
            labels = nn.utils.rnn.pad_sequence([torch.tensor(own) for _, own in batch], batch_first=True)
            loss = tagger.loss(tagger(*collate([window for window, _ in batch])), labels, torch.tensor([len(own) for _, own in batch]))
            loss.backward()
            for p, own in zip(weights, working):
                p.grad, own.grad = own.grad.float(), None
            nn.utils.clip_grad_norm_(weights, _MAX_NORM)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                torch._foreach_copy_(working, weights)
                torch._foreach_lerp_(list(averaged.values()), weights, 1 / _AVERAGED_OVER)
            losses.append(loss.item())
        print(f"epoch {epoch} of {epochs}: loss {sum(losses) / len(losses):.3f}, {time.time() - start:.0f} s", flush=True)
    return averaged


def main(epochs=5, seed=2026, start=None, without="", output=clause_tagger.WEIGHTS):
    torch.set_num_threads(1)
    left_out = set(filter(None, without.split(",")))
    rows = read("intents_train") + read("requests", "movielens")
    frames = (dataset_dir() / "prompts" / "intent_frames.txt").read_text(encoding="utf-8").splitlines()
    trained = train(clause_tagger.untrained(), [row for row in rows if row[2] not in left_out], frames, epochs, seed, start)
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
    main(**parse_settings(sys.argv[1:], ("start", "without", "output")))
