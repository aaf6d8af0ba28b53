"""Seconds of training until our backbone is as good as RecBole's at its best epoch.

    python benchmarks/time_to_quality.py [--models=SASRec,GRU4Rec] [--dataset=ml-100k] [--epochs=100] [--file=FILE.json]

Quality is NDCG@10 of the next item on the validation part, by our evaluator on both sides; its time is not counted. Seconds are
of the processor: give OMP_NUM_THREADS=1, and other jobs disturb neither side much. RecBole
trains by its own recipe, one row per prefix, until ten epochs (its `stopping_step`) bring nothing better, or for `epochs`.
Ours is stage 1 of DPR_<model> with its defaults (--stage1='{epochs: 6}' for others). FILE (default: time_to_quality.json)
keeps every epoch as it ends, and RecBole's weights lie beside it: the same command goes on after an interruption.
Prints Markdown.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from recbole.utils import init_seed
from tabulate import tabulate

from recbole_dpr.cli import parse_settings
from recbole_dpr.config import make_config
from recbole_dpr.data.dataset import VALID, build_sequences
from recbole_dpr.evaluation import methods
from recbole_dpr.evaluation.evaluator import Evaluator, with_prompts
from recbole_dpr.evaluation.queries import PROMPT_KINDS, build_queries
from recbole_dpr.materials import read_dataset, read_sequences
from recbole_dpr.model import promptable
from recbole_dpr.model.backbones import ItemVocabulary
from recbole_dpr.run import machine, versions
from recbole_dpr.train.checkpoints import replacing
from recbole_dpr.train.trainer import StageTrainer
from recbole_dpr.zoo import RecBoleModel, dataset_class

_METRIC = "NDCG@10"


class Record:
    """Epochs of all curves, on disk as they end.

    Attributes:
        curves: dict "side model" -> list of dicts: processor seconds (of training alone) and score of an epoch.
    """

    def __init__(self, file):
        self.file = Path(file)
        self.curves = json.loads(self.file.read_text()) if self.file.exists() else {}

    def add(self, name, seconds, score):
        self.curves.setdefault(name, []).append({"seconds": seconds, "score": score})
        with replacing(self.file) as temporary:
            temporary.write_text(json.dumps(self.curves, indent=1))
        print(f"{name} epoch {len(self.curves[name])}: {seconds:.1f} s, {_METRIC} {score:.4f}", flush=True)

    def best(self, name):
        """Number of the best epoch, from 1; its score; seconds of training until its end."""
        scores = [epoch["score"] for epoch in self.curves[name]]
        number = int(np.argmax(scores)) + 1
        return number, scores[number - 1], self.until(name, number)

    def until(self, name, number):
        return sum(epoch["seconds"] for epoch in self.curves[name][:number])


def recbole_curve(record, model, dataset_name, most, settings):
    """RecBole's model, epoch by epoch, going on where the record ends."""
    config = make_config(model, dataset_name, (), {**settings, "show_progress": False})
    name, done = f"RecBole {model}", len(record.curves.get(f"RecBole {model}", ()))
    if done and (done >= most or done - record.best(name)[0] >= config["stopping_step"]):
        return
    dataset = read_dataset(config, dataset_class(config))
    sequences = build_sequences(dataset)
    recboles = RecBoleModel(config, dataset, sequences, record.file.with_suffix(f".{dataset_name}"))
    score = _quality(sequences, config)
    if recboles.file.exists():
        recboles.trainer.resume_checkpoint(recboles.file)
    done = recboles.trainer.start_epoch
    record.curves[name] = record.curves.get(name, [])[:done]  # the record may be an epoch ahead of the weights
    for epoch in range(done, most):
        init_seed(config["seed"] + epoch, config["reproducibility"])
        start = time.process_time()
        recboles.trainer._train_epoch(recboles.train_data, epoch)
        seconds = time.process_time() - start
        recboles.model.eval()
        record.add(name, seconds, score(recboles))
        recboles.trainer._save_checkpoint(epoch)
        if epoch + 1 - record.best(name)[0] >= config["stopping_step"]:
            return


def our_curve(record, model, dataset_name, settings):
    """Stage 1 of ours, all of its epochs: its learning rate falls towards the last one."""
    name = f"ours {model}"
    config = make_config(f"DPR_{model}", dataset_name, (), {**settings, "show_progress": False, "read_prompts": False})
    epochs = config["stage1"]["epochs"]
    if len(record.curves.get(name, ())) == epochs:
        return
    record.curves.pop(name, None)
    sequences = read_sequences(config)
    config["prompt_size"], config["n_categories"] = 1, len(sequences.category_names)  # stage 1 meets no prompt
    init_seed(config["seed"], config["reproducibility"])
    ours = promptable(config["model"])(config, ItemVocabulary(sequences.n_items, config)).to(config["device"])
    scratch = record.file.with_suffix(".ours")
    trainer = StageTrainer(config, ours, 1, config["stage1"], None, scratch, {})
    loader = ours.loader(sequences, config, config["stage1"], (config["seed"], 1))
    score = _quality(sequences, config, lambda evaluator, sets: methods.Base(methods.StateTable(evaluator, ours, sets), ours.item_matrix().detach()))
    for epoch in range(epochs):
        start = time.process_time()
        trainer._train_epoch(loader, epoch)
        record.add(name, time.process_time() - start, score(ours))
    shutil.rmtree(scratch)


def _quality(sequences, config, method=None):
    """A function of the model: its metric on the next items of the validation part."""
    sets = with_prompts(build_queries(sequences, config, VALID, [config["valid_window"]])[:1], None, VALID, PROMPT_KINDS)
    evaluator = Evaluator(sequences, config)
    return lambda model: evaluator.mean(sets[0], (method(evaluator, sets) if method else model).score)[_METRIC]


def main(models="SASRec,GRU4Rec", dataset="ml-100k", epochs=100, file="time_to_quality.json", **settings):
    record, rows = Record(file), []
    stage1 = {"stage1": settings.pop("stage1")} if "stage1" in settings else {}
    for model in models.split(","):
        recbole_curve(record, model, dataset, epochs, settings)
        our_curve(record, model, dataset, {**settings, **stage1})
        number, target, seconds = record.best(f"RecBole {model}")
        scores = [epoch["score"] for epoch in record.curves[f"ours {model}"]]
        reached = next((n for n, score in enumerate(scores, 1) if score >= target), None)
        own = record.until(f"ours {model}", reached) if reached else None
        rows.append([
            *(model, f"{target:.4f}", number, f"{seconds:.1f}"),
            *((reached, f"{own:.1f}", f"{seconds / own:.1f}") if reached else ("", f"not reached: {max(scores):.4f}", "")),
        ])  # fmt: skip
    used = versions()
    print(f"\n{dataset}; {machine()}; torch {used['torch']}, recbole {used['recbole']}\n")
    head = ["", f"{_METRIC}, validation", "RecBole: epoch", "seconds", "ours: epoch", "seconds", "times as fast"]
    print(tabulate(rows, headers=head, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(__doc__)
    main(**parse_settings(sys.argv[1:], ("models", "dataset", "file")))
