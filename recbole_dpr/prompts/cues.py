"""Prompt text -> clauses with intents, by negation cues (English): needs no model, and is right about half the time."""

import re

from recbole_dpr.prompts.intent import Clause
from recbole_dpr.prompts.templates import INTENTS, NEGATIVE, POSITIVE

# a cue turns what follows it in its clause into something to avoid
_CUES = re.compile(
    r"\b(?:no more|no|not|without|avoid(?:ing)?|skip(?:ping)?|exclud(?:e|ing)|except(?: for)?|anything but|rather than|instead of|"
    r"nothing|never|nobody|hates?|dislikes?|loathes?|detests?|refuses? to|omit|filter out|pass on|(?:sick|tired|bored) of|enough(?: of| with)?|less|fewer|spare me|leave out|stop(?: showing)?|other than|gone off|keep out|lost (?:all )?interest(?: in)?|"
    r"(?:keep|stay|steer) (?:away|clear)(?: from| of)?|(?:do|does|did|would|could|can|should|is|are|was|am)n['’]?t|cannot|can['’]t)\b",
    re.IGNORECASE,
)
# words that carry a cue along without being what is avoided
_FILLERS = re.compile(
    r"^(?:(?:i|we|me|us|you|to|want|wants|like|feel|in the mood|for|show|give|see|watch(?:ing)?|any(?:thing)?|more|of|with|please|"
    r"have|recommend|too|that is|that has|thanks?)\b[\s,]*)+",
    re.IGNORECASE,
)
_BREAKS = re.compile(r"\s*(?:[,;.!?]+(?:\s+|$)|\s[-–—]\s|\b(?:but|yet|however|though)\b)\s*", re.IGNORECASE)
# a cue on both sides of what is avoided: "leave musicals out", "keep it away from me"
_AROUND = re.compile(r"\b(?:leave|keep|take|rule|cut|hold|put)\s+(.+?)\s+(?:out|away|off|back|aside)\b.*", re.IGNORECASE)
_BUT_CUE = re.compile(r"\banything but\b", re.IGNORECASE)


def split(text):
    """Clauses of a text that has words, in its order; neighbours of one positive wish stay together.

    >>> [(c.text, c.intent) for c in split("a comedy, but no romance")]
    [('a comedy', 'positive'), ('romance', 'negative')]
    """
    pieces = _pieces(_BUT_CUE.sub("avoid", text))
    clauses = []
    for piece in pieces:
        piece = _AROUND.sub(r"avoid \1", piece)
        cue = _CUES.search(piece)
        before = piece[: cue.start()].strip(" ,;.!?") if cue else piece
        if cue is None or _content(before):
            positive = before if cue else piece
            if clauses and clauses[-1].intent == INTENTS[POSITIVE]:
                positive = f"{clauses.pop().text}, {positive}"
            clauses.append(Clause(positive, INTENTS[POSITIVE]))
        if cue:
            avoided = _FILLERS.sub("", piece[cue.end() :].strip()).strip(" ,;.!?") or piece.strip(" ,;.!?")
            clauses.append(Clause(avoided, INTENTS[NEGATIVE]))
    return clauses


def _pieces(text):
    return [piece for piece in (p.strip(" ,;.!?") for p in _BREAKS.split(text)) if re.search(r"\w", piece)] or [text]


def _content(text):
    """Whether what stands before a cue asks for something of its own ("a western without gunfights")."""
    return bool(re.search(r"\w", _FILLERS.sub("", text)))
