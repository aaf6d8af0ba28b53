"""The pools of prompt templates: training, validation and evaluation never share a wording."""

from itertools import product
from pathlib import Path

from recbole_dpr.errors import UserError, unknown
from recbole_dpr.resources import properties_dir
from recbole_dpr.yamlfile import read_yaml

POSITIVE, NEGATIVE = 0, 1
INTENTS = ("positive", "negative")
# kept for validation: the last of the training templates, and every so-manieth frame
_TEMPLATES_HELD_OUT = 4
_FRAMES_HELD_OUT = 6
# the two forms of a template -> the frames that training has beside the templates
_KINDS = {"category": "category_frames.yaml", "tag": "frames.yaml"}


class Templates:
    """Prompt texts from templates.

    Args:
        name: a file of `properties/prompts` without its ending, or the path of a YAML file of that form.

    Raises:
        UserError: no such file, or a pool is missing in it.

    Attributes:
        chatter: {"before": list, "after": list} of small talk, for the tagger.
    """

    def __init__(self, name):
        folder = properties_dir() / "prompts"
        path = Path(name) if str(name).endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
        if not path.is_file():
            raise unknown("prompt_templates=", name, sorted(p.stem for p in folder.glob("*.yaml")), "or give a YAML file")
        pools = read_yaml(path)
        try:
            written = {
                (kind, intent, part): [entry[kind] for entry in pools[intent][part]]
                for kind in _KINDS
                for intent in INTENTS
                for part in ("train", "eval")
            }
        except (KeyError, TypeError) as error:
            raise UserError(f"prompt templates {path}: every intent and part needs category and tag forms ({error})") from None
        frames = {kind: read_yaml(folder / file) for kind, file in _KINDS.items()}
        self._pools = {}
        for kind, intent in product(_KINDS, INTENTS):
            own, more = written[kind, intent, "train"], frames[kind][intent]
            kept = [frame for number, frame in enumerate(more) if number % _FRAMES_HELD_OUT]
            self._pools[kind, intent, "train"] = own[:-_TEMPLATES_HELD_OUT] + kept
            self._pools[kind, intent, "valid"] = own[-_TEMPLATES_HELD_OUT:] + more[::_FRAMES_HELD_OUT]
            self._pools[kind, intent, "eval"] = written[kind, intent, "eval"]
        self._tagger_frames, self.chatter = read_yaml(folder / "tagger_frames.yaml"), read_yaml(folder / "chatter.yaml")

    def size(self, kind, intent, part):
        """Number of templates of a pool.

        Args:
            kind: category or tag; intent: POSITIVE or NEGATIVE; part: train, valid or eval.
        """
        return len(self._pools[kind, INTENTS[intent], part])

    def category(self, intent, part, index, name):
        """The prompt that asks for (or against) the category `name`, as the data file spells it."""
        name = name.lower()
        article = "an" if name[0] in "aeiou" else "a"
        text = self._pools["category", INTENTS[intent], part][index]
        return text.replace("{a_category}", f"{article} {name}").replace("{category}", name)

    def tag(self, intent, part, index, tag):
        """The prompt that asks for (or against) what the tag describes."""
        return in_sentence(self._pools["tag", INTENTS[intent], part][index], tag)

    def carriers(self, intent):
        """The sentences with {tag} that training uses."""
        return self._pools["tag", INTENTS[intent], "train"]

    def tagger_carriers(self, intent):
        """These and more, for the tagger that finds descriptions in sentences."""
        return self.carriers(intent) + self._tagger_frames[INTENTS[intent]]


def in_sentence(form, tag):
    """A tag in the sentence `form` that has {tag}."""
    return form.replace("{tag}", tag[:1].lower() + tag[1:].rstrip("."))
