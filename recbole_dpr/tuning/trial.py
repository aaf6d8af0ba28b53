"""One trial of a search, as it runs in a process of Ray's: settings -> training, a report after each epoch."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

from recbole_dpr import run, zoo
from recbole_dpr.config import make_config
from recbole_dpr.model import is_promptable

SCORE, PROGRESS = "score", "stages_done"


@dataclass(frozen=True)
class Task:
    """What the trials of a search have in common: settings, which each changes, and what was read and embedded before.

    Attributes:
        model, dataset: names; settings: dict of keys.
        data: Materials of a promptable model; of another the RecBole dataset that was read, without its config.
    """

    model: str
    dataset: str
    settings: dict
    data: Any


def run_trial(values, task):
    """Train one model; a trial that Ray has stopped or lost goes on from its last report.

    Args:
        values: the keys of the search space with the values of this trial; task: Task.
    """
    with tempfile.TemporaryDirectory(dir=".") as folder:  # Ray gives each trial a working directory of its own
        checkpoint = tune.get_checkpoint()
        if checkpoint:
            checkpoint.to_directory(Path(folder) / "checkpoints")
        gpus = ",".join(str(number) for number in ray.get_gpu_ids())  # else RecBole would put all trials on GPU 0
        train(values, task, Path(folder), lambda metrics, state: tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(state)), gpus)


def train(values, task, folder, report, gpus=""):
    """The training of a trial; it reads no data and measures nothing on the test part.

    Args:
        folder: Path of the run; checkpoints that lie in it are gone on from.
        report: called after each epoch with its metrics and the folder of the checkpoints.
        gpus: ids of the GPUs to use, "" for the CPU.
    """
    config = make_config(task.model, task.dataset, (), {**task.settings, **values, "show_progress": False, "gpu_id": gpus})
    home, stages = run, config["stages"]
    if not is_promptable(task.model):
        home, stages, task.data.config = zoo, [1], config
    home.train_only(config, folder, task.data, lambda trainer: report(metrics_of(trainer, stages), folder / "checkpoints"))


def metrics_of(trainer, stages):
    """What is reported after an epoch.

    The score is the best validation score of this stage so far, which is what the trial would be left with: a stage
    ends with the weights of its best epoch. It means something else in each stage, so trials are compared at equal
    `stages_done`: the stages behind it, and the share of this one's epochs. A stage that stops early is done; so
    whatever a trial reports up to 1.0 is of its first stage, up to 2.0 of its second, and any two scores that are
    compared are of one stage.

    Args:
        trainer: RecBole's or a StageTrainer, after an epoch; stages: numbers of the stages of the run.
    """
    row = trainer.history[-1]
    over = trainer.cur_step > trainer.stopping_step
    share = 1.0 if over else (row["epoch"] + 1) / trainer.epochs
    score = float(trainer.best_valid_score)
    return {**row, "epoch": row["epoch"] + 1, SCORE: score, "epoch_score": float(row["score"]), PROGRESS: stages.index(row["stage"]) + share}
