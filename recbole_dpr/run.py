"""run_dpr: the story of one run, from the settings to the table."""

import json
import logging
import platform
import resource
import sys
import time
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import yaml
from recbole.utils import init_seed

from recbole_dpr import distributed
from recbole_dpr.config import make_config, model_name, settings_in_force
from recbole_dpr.data.loaders import TrainingPrompts
from recbole_dpr.errors import UserError
from recbole_dpr.evaluation import methods, report
from recbole_dpr.evaluation.evaluator import Evaluator
from recbole_dpr.evaluation.queries import PROTOCOL_KEYS
from recbole_dpr.materials import attach, prepare_prompts, read_sequences
from recbole_dpr.model import is_promptable, promptable
from recbole_dpr.model.backbones import ItemVocabulary
from recbole_dpr.precision import compute_dtype
from recbole_dpr.prompts.bank import PromptTable
from recbole_dpr.prompts.intent import router
from recbole_dpr.prompts.item_text import DescriptionText, MeanText
from recbole_dpr.serving import recommender
from recbole_dpr.train import checkpoints
from recbole_dpr.train.trainer import StageTrainer

logger = logging.getLogger(__name__)

_VERSIONED = ("recbole-dpr", "recbole", "torch", "numpy", "pandas", "sentence-transformers", "transformers")
# w of Base + w x text, chosen on validation: for the cosine, and for the log-likelihood ratio
_COSINE_WEIGHTS = (1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 56, 80)
_LIKELIHOOD_WEIGHTS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8)
# baselines that train on from stage 1: name -> settings, and a number that sets the random draws of each apart
_FINE_TUNED = {"+f": ("base_f", 4), "+f+a": ("base_f_a", 5)}
_SAMPLE_PROMPTS = ("a comedy", "something dark and tense, but no horror")


def run_dpr(model="DPR_SASRec", dataset="ml-100k", config_files=(), config_dict=None):
    """Train and evaluate one model; everything it gives is in one folder.

    Args:
        model: a name of `recbole_dpr.model.MODELS`, DPR with the key `backbone`, or any model of RecBole.
        dataset: dataset name.
        config_files: YAML files of settings.
        config_dict: settings that win over all files.

    Returns:
        The dict that metrics.json holds, and "folder".

    Raises:
        UserError: an input that can be put right, in one line.
    """
    config_dict = dict(config_dict or {})
    model = model_name(model, config_files, config_dict)
    group = distributed.launch_settings(config_dict)
    if group and not is_promptable(model):
        raise UserError(f"nproc: '{model}' is trained by RecBole's own recipe here, in one process; several are for DPR models")
    if group:
        folder = distributed.launch(_folder_of_run, (model, dataset, config_files, config_dict), **group)
        return {**json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8")), "folder": folder}
    folder = _resumed(config_dict, model, dataset)
    config = make_config(model, dataset, config_files, config_dict)
    folder = folder or _new_folder(config, model, dataset)
    if not distributed.is_first():
        config["show_progress"] = False
    _write_config(folder / "config.yaml", config)
    if not is_promptable(model):
        from recbole_dpr.zoo import run_recbole_model

        return run_recbole_model(config, folder)
    return _Run(config, folder).result()


def _folder_of_run(*arguments):
    """What goes through the pipe from a process of `run_dpr`."""
    return run_dpr(*arguments)["folder"]


def train_only(config, folder, materials, on_epoch):
    """The training of a promptable model without its test, on what was read and embedded before: a trial of a search.

    Args:
        config: recbole Config; folder: Path; checkpoints that lie in it are gone on from.
        materials: of `prepare_prompts`.
        on_epoch: as of `StageTrainer.run`.
    """
    _Run(config, folder, on_epoch).train(materials)


class _Run:
    """One run of a promptable model; each method is a chapter."""

    def __init__(self, config, folder, on_epoch=None):
        self.config, self.folder, self.on_epoch = config, folder, on_epoch
        self.show = bool(config["show_progress"])
        self.seconds, self.history = {}, []

    def result(self):
        with self._timed("data"):
            sequences = read_sequences(self.config)
        self._say(f"{self.config['dataset']}: {_counted(sequences.stats())}")
        with self._timed("prompts"):
            with distributed.first_goes_first():
                materials, self.encoder = prepare_prompts(self.config, sequences, self.show)
            self.parse = router(self.config["intent_router"], self.config["intent_model"])  # here, so that one that is missing costs no training
        stages = self.train(materials)
        if self.config["baselines"]:
            with self._timed("baselines"):
                for suffix in _FINE_TUNED:
                    self._fine_tune(suffix)
        with self._timed("evaluate"):
            results = self._evaluate(stages)
        return self._write(results)

    def train(self, materials):
        """Build the model and train its stages; returns their numbers."""
        self.materials, self.sequences = materials, materials.sequences
        self._build_model()
        stages = self._stages()
        for number in stages:
            with self._timed(f"stage{number}"):
                self._train(number)
        return stages

    # --- chapters

    def _build_model(self):
        config, bank = self.config, self.materials.bank
        config["prompt_size"], config["n_categories"] = bank.vectors.shape[1], len(self.sequences.category_names)
        init_seed(config["seed"], config["reproducibility"])
        self.model = promptable(config["model"])(config, ItemVocabulary(self.sequences.n_items, config)).to(config["device"])
        attach(self.model, self.materials)
        self.evaluator = Evaluator(self.sequences, config)

    def _stages(self):
        """The stages of this run: fine prompts need tags or wishes."""
        texts, stages = self.materials.bank.texts, self.config["stages"]
        if 3 in stages and not (texts.has_tags or texts.has_wishes):
            self._say(
                f"stage 3 is left out: no semantic tags or wishes for {self.config['dataset']} (item_texts=FOLDER brings them); "
                "the item side uses titles and categories"
            )
            return [number for number in stages if number != 3]
        return stages

    def _train(self, number):
        config, folder = self.config, self.folder / "checkpoints"
        if number == 1 and config["stage1_checkpoint"]:
            return self._take_over_stage1(Path(config["stage1_checkpoint"]), folder)
        settings = config[f"stage{number}"]
        prompts = None if number == 1 else TrainingPrompts(self.sequences, self.materials.bank, config, settings["prompts"])
        loader = self.model.loader(self.sequences, config, settings, (config["seed"], number), prompts)
        trainer = StageTrainer(config, self.model, number, settings, lambda: self._validate(settings["valid_tasks"]), folder, self._identity())
        self.history += trainer.run(loader, self.show, self.on_epoch)
        if number == 1:
            self.model.start_prompting()

    def _fine_tune(self, suffix):
        """Base+f, on next items, or Base+f+a, on the targets of stage 2 without their prompts; both start where stage 1 ended."""
        config, folder, (key, number) = self.config, self.folder / "checkpoints", _FINE_TUNED[suffix]
        self._load_weights("stage1")
        settings, prompts, loss = config[key], None, None
        if suffix == "+f+a":
            prompts = TrainingPrompts(self.sequences, self.materials.bank, config, settings["prompts"])
            loss = self.model.implicit_loss
        loader = self.model.loader(self.sequences, config, settings, (config["seed"], number), prompts)
        validate = lambda: self._validate(settings["valid_tasks"], self._unprompted)  # noqa: E731
        trainer = StageTrainer(config, self.model, number, settings, validate, folder, self._identity(), f"Base{suffix}", loss)
        self.history += trainer.run(loader, self.show)

    def _identity(self):
        """What a checkpoint has to agree on with the run that reads it."""
        return checkpoints.identity(self.config, self.sequences.item_tokens)

    def _take_over_stage1(self, source, folder):
        """Stage 1 of another run: the backbone alone, so the prompt settings of both may differ."""
        source = source / "checkpoints" / "stage1.best.pt"
        state = checkpoints.load(source, self.config["device"])
        checkpoints.check_identity(state, self._identity(), source)
        own = self.model.state_dict()
        taken = {name: value for name, value in state["state_dict"].items() if self.model.is_backbone(name)}
        sizes = [{name: w.shape for name, w in weights.items() if self.model.is_backbone(name)} for weights in (own, taken)]
        if sizes[0] != sizes[1]:
            raise UserError(f"checkpoint {source} is of another backbone than {self.config['model']}'s, or of other sizes; name a run with the same")
        own.update(taken)
        self.model.load_state_dict(own)
        checkpoints.save(folder / "stage1.best.pt", {**state, "state_dict": own})
        self.model.start_prompting()
        self._say(f"stage 1 taken over from {source}")

    def _validate(self, tasks, answering=None):
        sets = [p for p in self.materials.valid if p.name in tasks]
        method = (answering or self._prompted)(sets)
        scores = {p.name: self.evaluator.mean(p, method.score)[self.config["valid_metric"]] for p in sets}
        return {"score": sum(scores.values()) / len(scores), **scores}

    def _unprompted(self, sets):
        """The unprompted backbone as a method for these query sets: it ignores their prompts."""
        return methods.Base(methods.StateTable(self.evaluator, self.model, sets), self.model.item_matrix().detach())

    def _prompted(self, sets, kind=methods.Prompted, **more):
        """The model as a method for these query sets, with the states that they need."""
        self.model.eval()
        states = methods.StateTable(self.evaluator, self.model, sets)
        answering = None
        asked = [p for p in sets if p.kind != "none"]
        if asked and self.model.answering is not self.model:
            answering = methods.StateTable(self.evaluator, self.model.answering, asked)
        return kind(states, answering, self.model, **more)

    def _evaluate(self, stages):
        """Every method on every query set; the weights of each stage come from its best checkpoint."""
        name, results = self.config["model"], []
        if self.config["baselines"]:
            for suffix in _FINE_TUNED:
                self._load_weights(f"Base{suffix}")
                results += self._plain_and_filtered(suffix, self._unprompted(self.materials.test))
        for number in stages:
            self._load_weights(f"stage{number}")
            if number == 1:
                base = self._unprompted(self.materials.test)
                results = self._plain_and_filtered("", base) + results + self._text_baselines(base)
            else:
                label = name if number == stages[-1] else f"{name}/stage{number}"
                results += self._measure(label, self._prompted(self.materials.test))
        if stages[-1] > 1:
            prompted = [p for p in self.materials.test if p.kind != "none"]
            results += self._measure(f"{name}/rand", self._prompted(prompted, methods.RandomPrompts, seed=self.config["seed"]), prompted)
        return results + report.averages(results)

    def _load_weights(self, stage):
        state = checkpoints.load(self.folder / "checkpoints" / f"{stage}.best.pt", self.config["device"])
        self.model.load_state_dict(state["state_dict"])

    def _plain_and_filtered(self, suffix, base):
        categories = torch.from_numpy(self.sequences.categories).to(self.config["device"])
        rows = self._measure(f"Base{suffix}", base)
        return rows + self._measure(f"Filter{suffix}", methods.Filter(base, categories), tasks=("POS", "NEG"))

    def _text_baselines(self, base):
        """What the items' text gives, alone and beside stage 1."""
        bank, device = self.materials.bank, self.config["device"]
        whole = PromptTable(bank.vectors)
        cosine = methods.TextFit(MeanText(bank, device), whole)
        if not cosine.text.vectors.any():
            return []
        rows = self._measure("Text", cosine, tasks=("POS", "NEG"))
        description = methods.TextFit(DescriptionText(bank, device), whole)
        rows += self._with_text("CTRL-Rec", base, description, _COSINE_WEIGHTS, lambda prompted: prompted.queries.task)
        rows += self._with_text("Base+text", base, cosine, _COSINE_WEIGHTS)
        if self.model.item_text is not None:
            likelihood = methods.TextFit(self.model.item_text, bank.asked)
            rows += self._with_text("Base+likelihood", base, likelihood, _LIKELIHOOD_WEIGHTS)
        return rows

    def _with_text(self, label, base, text, grid, group=lambda prompted: prompted.name):
        """Base + w x text, w chosen on validation for each group of query sets: by default each task and kind of prompt."""
        rows, valid = [], [p for p in self.materials.valid if p.kind != "none"]
        valid_base = self._unprompted(valid)
        for name in dict.fromkeys(map(group, valid)):
            weight, _ = methods.tuned_weight(self.evaluator, valid_base, text, [p for p in valid if group(p) == name], grid)
            self._say(f"{label}: w = {weight} for {name}, chosen on validation")
            only = [p for p in self.materials.test if p.kind != "none" and group(p) == name]
            rows += self._measure(label, methods.WeightedSum(base, text, weight), only)
        return rows

    def _measure(self, label, method, sets=None, tasks=("SEQ", "POS", "NEG")):
        sets = sets or [p for p in self.materials.test if p.queries.task in tasks]
        return self.evaluator.rows(label, method, sets)

    def _write(self, results):
        config, folder = self.config, self.folder
        self._set_mean_states()
        recommender.save(folder, self.model, config, self.sequences, self.encoder)
        result = {
            **{"model": config["model"], "dataset": config["dataset"], "seed": config["seed"]},
            "versions": versions(),
            "machine": machine(),
            "protocol": {key: config[key] for key in PROTOCOL_KEYS},
            "prompt_encoder": self.encoder.name,
            "dataset_stats": self.sequences.stats(),
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "peak_memory_mb": peak_memory_mb(),
            "history": self.history,
            "results": results,
        }
        if self.history:
            report.plot_curves(folder / "curves.png", self.history)
        write_results(folder, result, self.evaluator.scored)
        self._show_samples()
        return {**result, "folder": str(folder)}

    def _set_mean_states(self):
        """The average user of the validation part, who stands in for one without a history."""
        position = np.unique(np.concatenate([p.queries.position for p in self.materials.valid]))
        for row, backbone in enumerate((self.model, self.model.answering)):
            self.model.mean_states[row] = self.evaluator.states(backbone, position).mean(0)

    def _show_samples(self):
        """A few lists with titles, without and with a prompt, for one test user."""
        sequences = self.sequences
        names = [c.tolist() for c in (np.array(sequences.category_names, dtype=object)[row] for row in sequences.categories[1:])]
        answers = recommender.Recommender(
            self.model, sequences.item_tokens[1:], sequences.titles[1:], names, self.encoder, self.config["MAX_ITEM_LIST_LENGTH"], parse=self.parse
        )
        user = self.materials.test[0].queries.position[0]
        start = sequences.offsets[sequences.user_of[user]]
        history = sequences.item_tokens[sequences.items[start:user]].tolist()
        for prompt in (None, *_SAMPLE_PROMPTS):
            found = answers.recommend(history, prompt, k=5)
            shown = "; ".join(title or item for title, item in zip(found.titles, found.items))
            self._say(f"{'no prompt' if prompt is None else repr(prompt)}: {shown}")

    # --- helpers

    @contextmanager
    def _timed(self, name):
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def _say(self, line):
        if self.show:
            print(line, flush=True)


def write_results(folder, result, scored):
    """per_query.npz, table.md and metrics.json, each whole or not at all; the last says that the run has ended.

    Args:
        scored: as `Evaluator.scored`.
    """
    with checkpoints.replacing(folder / "per_query.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **scored)
    with checkpoints.replacing(folder / "table.md") as temporary:
        temporary.write_text(report.table(result), encoding="utf-8")
    with checkpoints.replacing(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")


def versions():
    """Versions of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine():
    """The machine in words: the GPU, or the processor, what torch uses of it and the threads."""
    if torch.cuda.is_available():
        one = torch.cuda.get_device_name()
    else:
        low = " and bfloat16" if compute_dtype("auto", torch.device("cpu")) == torch.bfloat16 else ""
        one = f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}{low}), {torch.get_num_threads()} threads"
    return one if distributed.world_size() == 1 else f"{distributed.world_size()} processes, each {one}"


def peak_memory_mb():
    """Highest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _new_folder(config, model, dataset):
    """The run's folder, made now: a folder that cannot be written is an error before the work, not after it."""
    now = distributed.from_first(f"{datetime.now():%Y%m%d-%H%M%S}")
    default = Path(config["checkpoint_dir"]) / f"{model}-{dataset}-{now}"
    folder = Path(config["output_dir"] or default)
    if (folder / "checkpoints").exists():
        raise UserError(f"output_dir={folder}: holds a run already; go on with --resume={folder}, or name another folder")
    return folder


def begun(folder):
    """What a run in a folder was begun with: (model, dataset, dict of the other settings).

    Raises:
        UserError: there is none.
    """
    try:
        kept = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))
        return kept.pop("model"), kept.pop("dataset"), kept
    except (OSError, yaml.YAMLError, KeyError, AttributeError):
        raise UserError(f"resume={folder}: no config.yaml there; name the folder of an interrupted run") from None


def _resumed(config_dict, model, dataset):
    """The folder to go on from, its settings put below those given; None without `resume`."""
    if not config_dict.get("resume"):
        return None
    folder = Path(config_dict["resume"])
    *started, kept = begun(folder)
    if started != [model, dataset]:
        raise UserError(f"resume={folder}: holds a run of {' on '.join(started)}, not of {model} on {dataset}")
    for key, value in kept.items():
        config_dict.setdefault(key, value)
    return folder


def _write_config(path, config):
    with checkpoints.replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(settings_in_force(config), sort_keys=False), encoding="utf-8")


def _counted(stats):
    return ", ".join(f"{value:,} {name}" for name, value in stats.items())
