"""The parts of a benchmark: which runs it is made of, and each run once, whatever happens between two calls."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

from recbole_dpr.config import STAGES, check_keys, find_model, known_keys, make_config, recbole_models, settings_in_force
from recbole_dpr.data.dataset import check_files
from recbole_dpr.errors import UserError, unknown
from recbole_dpr.model import is_promptable
from recbole_dpr.model.backbones import sequential_models
from recbole_dpr.resources import properties_dir
from recbole_dpr.run import run_dpr
from recbole_dpr.yamlfile import read_yaml

# keys of the runs that are the benchmark's to set, and what to do instead
_OWN_KEYS = {
    **{"seed": "give --seeds=1,2,3", "resume": "give the same command again"},
    **{"backbone": "name the model DPR_<backbone>", "stage1_checkpoint": "stage 1 is shared between the parts that can"},
}
# settings that may differ between two calls: they say where things are, not what comes out
_PLACES = ("checkpoint_dir", "data_path", "data_cache_dir", "prompt_cache_dir", "show_progress", "stage1_checkpoint")


@dataclass(frozen=True)
class Part:
    """One run.

    Attributes:
        model, seed; ablation: its name, or None for the full model.
        settings: overrides as for `run_dpr`, the seed among them.
        stage1_of: the Part whose stage 1 it takes over, or None.
    """

    model: str
    seed: int
    ablation: str | None = None
    settings: dict = field(default_factory=dict, compare=False)
    stage1_of: "Part | None" = field(default=None, compare=False)

    @property
    def name(self):
        """Of its folder."""
        return "-".join([self.model, *([self.ablation] if self.ablation else []), f"seed{self.seed}"])

    @property
    def label(self):
        """Of its row in the table."""
        return f"{self.model}, {self.ablation}" if self.ablation else self.model

    def finished(self, folder):
        return (folder / self.name / "metrics.json").is_file()

    def started(self, folder):
        return self.finished(folder) or (folder / self.name / "checkpoints").is_dir()

    def run(self, dataset, folder):
        """Run it, or go on with it, below `folder`. Returns whether there was anything to do."""
        if self.finished(folder):
            return False
        own, settings = folder / self.name, dict(self.settings)
        if self.stage1_of and self.stage1_of.finished(folder):
            settings["stage1_checkpoint"] = str(folder / self.stage1_of.name)
        settings["resume" if self.started(folder) else "output_dir"] = str(own)
        run_dpr(self.model, dataset, (), settings)
        return True


def plan(models, ablations, seeds, settings, ablated=()):
    """The parts, in the order in which they run: for each seed the models, then the ablations of those that are DPR's.

    Args:
        models, ablations, seeds, ablated: as for `run_benchmark`; settings: dict of keys, for the models that know them, and
            `per_model`: model -> dict of keys for it alone.

    Raises:
        UserError: no model, an unknown one or an unknown ablation, ablations without a DPR model, or of one
            that is not among the models, bad seeds.
    """
    per_model = _per_model(settings)
    for given in (settings, *per_model.values()):
        for key, way_out in _OWN_KEYS.items():
            if given.get(key) is not None:
                raise UserError(f"{key}={given[key]}: benchmark sets this key itself; {way_out}")
    models = _names(models)
    if not models:
        raise UserError("no model is named; give some, such as --models=Pop,SASRec,DPR_SASRec")
    existing = {*recbole_models(), *(f"DPR_{backbone}" for backbone in sequential_models())}  # whether it can be had or not
    for model in models:
        if model == "DPR":
            raise UserError("model 'DPR' needs a backbone: name it DPR_<backbone>, such as DPR_NARM")
        if model not in existing:
            find_model(model)  # which says what there is
    for model, own in per_model.items():
        if model not in models:
            raise unknown("per_model: model", model, models)
        check_keys(own.keys() - _known_keys(model), model)
    promptable = [model for model in models if is_promptable(model)]
    ablations = _ablations(ablations)
    if ablations and not promptable:
        raise UserError(f"ablations={','.join(ablations)}: they are of DPR models, and --models={','.join(models)} names none")
    ablated = _names(ablated)
    for model in ablated:
        if model not in promptable:
            raise unknown("ablated model", model, promptable)
    parts = []
    for seed in _seeds(seeds):
        full = {}
        for model in models:
            extra = {"baselines": True} if is_promptable(model) else {}
            known = _known(model, merged(settings, per_model.get(model, {})))
            full[model] = Part(model, seed, settings={**extra, **known, "seed": seed})
        parts += full.values()
        parts += [
            Part(model, seed, name, merged(full[model].settings, {"baselines": False}, changes), full[model])
            for model in ablated or promptable
            for name, changes in ablations.items()
        ]
    return parts


def check_settings(parts, dataset, settings):
    """Refuse settings that no model knows or that some model refuses, and a dataset without files, before any work.

    A model that cannot be had at all is left to its own part.

    Args:
        parts: of the full models, for one seed.

    Returns:
        the Config of one part.
    """
    models = [part.model for part in parts]
    known = set().union(*map(_known_keys, models))
    check_keys(settings.keys() - known - {"per_model"}, next(filter(is_promptable, models), models[0]))
    found, refused = None, None
    for part in parts:
        try:
            found = make_config(part.model, dataset, (), part.settings)
        except UserError as error:
            if _accepted(part.model, dataset):
                raise  # so the settings are at fault
            refused = error
    if found is None:
        raise refused
    tested = [f"{metric}@{k}" for metric in ("NDCG", "Recall") for k in found["topk"]]
    if found["valid_metric"] not in tested:
        raise unknown("valid_metric=", found["valid_metric"], tested, "differences are tested on it")
    check_files(found)
    return found


def check_folders(parts, dataset, folder):
    """Refuse to mix: a part that lies in the folder has to be of the settings that it would get now.

    Raises:
        UserError: it is of others.
    """
    for part in parts:
        if not part.started(folder):
            continue
        try:
            config = make_config(part.model, dataset, (), part.settings)
        except UserError:
            continue  # its own part will say so
        kept = read_yaml(folder / part.name / "config.yaml")
        now = yaml.safe_load(yaml.safe_dump(settings_in_force(config)))
        for key in now.keys() & kept.keys() - set(_PLACES):
            if now[key] != kept[key]:
                raise UserError(
                    f"output_dir={folder}: {part.name} in it is of {key}={kept[key]}, not {now[key]}; "
                    "name another --output_dir=, or delete that part's folder"
                )


def merged(*several):
    """One dict of settings from several, later ones win; keys of a stage one by one, whichever way they are written."""
    result = {}
    for settings in several:
        for key, value in settings.items():
            name, dot, inner = key.partition(".")
            if dot:
                value = {inner: value}
            old = result.get(name)
            both = name in STAGES and isinstance(old, dict) and isinstance(value, dict)
            result[name] = {**old, **value} if both else value
    return result


_known_keys = cache(known_keys)


def _known(model, settings):
    return {key: value for key, value in settings.items() if key in _known_keys(model)}


def _per_model(settings):
    given = settings.get("per_model") or {}
    if not (isinstance(given, dict) and all(isinstance(own, dict) for own in given.values())):
        raise UserError(f"per_model={given}: give settings by model, such as {{SASRec: {{epochs: 20}}}}")
    return given


def _accepted(model, dataset):
    try:
        make_config(model, dataset)
    except UserError:
        return False
    return True


def _ablations(names):
    """Name -> the settings that it changes."""
    if not names:
        return {}
    known = read_yaml(properties_dir() / "ablations.yaml")
    chosen = {}
    for name in known if names == "all" else _names(names):
        if name not in known:
            raise unknown("ablation", name, known)
        changes = dict(known[name])
        file = changes.pop("config_files", None)
        chosen[name] = merged(read_yaml(properties_dir() / file), changes) if file else changes
    return chosen


def _seeds(seeds):
    given = _names(seeds) or [str(read_yaml(properties_dir() / "dpr.yaml")["seed"])]
    if not all(seed.isdecimal() for seed in given):
        raise UserError(f"seeds={','.join(given)}: whole numbers from 0 are needed, such as --seeds=1,2,3")
    return list(dict.fromkeys(map(int, given)))


def _names(given):
    """A list of names from a list, from a text with commas, or from a value of YAML; each once."""
    if not isinstance(given, (list, tuple)):
        given = [] if given is None else str(given).split(",")
    return list(dict.fromkeys(str(name).strip() for name in given if str(name).strip()))
