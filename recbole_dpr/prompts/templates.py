"""The pools of prompt templates: training, validation and evaluation never share a wording."""

from pathlib import Path

from recbole_dpr.errors import UserError, unknown
from recbole_dpr.resources import properties_dir
from recbole_dpr.yamlfile import read_yaml

POSITIVE, NEGATIVE = 0, 1
INTENTS = ("positive", "negative")
# kept for validation: the last of the training templates, and every so-manieth frame
_TEMPLATES_HELD_OUT = 4
_FRAMES_HELD_OUT = 6


class Templates:
    """Prompt texts from templates.

    Args:
        name: a file of `properties/prompts` without its ending, or the path of a YAML file of that form.

    Raises:
        UserError: no such file, or a pool is missing in it.
    """

    def __init__(self, name):
        folder = properties_dir() / "prompts"
        path = Path(name) if str(name).endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
        if not path.is_file():
            raise unknown("prompt_templates=", name, sorted(p.stem for p in folder.glob("*.yaml")), "or give a YAML file")
        pools = read_yaml(path)
        try:
            self._pools = {
                (intent, part): [(entry["category"], entry["tag"]) for entry in pools[intent][part]]
                for intent in INTENTS
                for part in ("train", "eval")
            }
        except (KeyError, TypeError) as error:
            raise UserError(f"prompt templates {path}: every intent and part needs category and tag forms ({error})") from None
        frames, for_tagger = read_yaml(folder / "frames.yaml"), read_yaml(folder / "tagger_frames.yaml")
        self._carriers, self._tagger_carriers = {}, {}
        for intent in INTENTS:
            train, own = self._pools[intent, "train"], frames[intent]
            held_out = [(frame.replace("{tag}", "{category}"), frame) for frame in own[::_FRAMES_HELD_OUT]]
            self._pools[intent, "train"] = train[:-_TEMPLATES_HELD_OUT]
            self._pools[intent, "valid"] = train[-_TEMPLATES_HELD_OUT:] + held_out
            kept = [frame for number, frame in enumerate(own) if number % _FRAMES_HELD_OUT]
            self._carriers[intent] = [form for _, form in self._pools[intent, "train"]] + kept
            self._tagger_carriers[intent] = self._carriers[intent] + for_tagger[intent]

    def size(self, intent, part):
        """Number of templates of a pool; `part` is train, valid or eval, `intent` POSITIVE or NEGATIVE."""
        return len(self._pools[INTENTS[intent], part])

    def category(self, intent, part, index, name):
        """The prompt that asks for (or against) the category `name`, as the data file spells it."""
        name = name.lower()
        article = "an" if name[0] in "aeiou" else "a"
        text = self._pools[INTENTS[intent], part][index][0]
        return text.replace("{a_category}", f"{article} {name}").replace("{category}", name)

    def tag(self, intent, part, index, tag):
        """The prompt that asks for (or against) what the tag describes."""
        return in_sentence(self._pools[INTENTS[intent], part][index][1], tag)

    def carriers(self, intent):
        """Sentences with {tag} that only training uses: its pool, and the frames not held out."""
        return self._carriers[INTENTS[intent]]

    def tagger_carriers(self, intent):
        """These and more, for the tagger that finds descriptions in sentences."""
        return self._tagger_carriers[INTENTS[intent]]


def in_sentence(form, tag):
    """A tag in the sentence `form` that has {tag}."""
    return form.replace("{tag}", tag[:1].lower() + tag[1:].rstrip("."))
