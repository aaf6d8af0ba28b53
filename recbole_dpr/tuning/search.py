"""A search with Ray Tune: what the trials share goes into Ray's object store, ASHA stops the worse half on the way.

The folder of a search holds `search.yaml` (what was asked for), `ray/` (Ray's own state and the trials' checkpoints),
and in the end `best.yaml`, `trials.csv`, `trials.md` and `trials.png`.
"""

import dataclasses
import logging
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml

from recbole_dpr.config import make_config, merged_settings, model_name, settings_in_force
from recbole_dpr.errors import UserError
from recbole_dpr.materials import prepare_prompts, read_dataset, read_sequences
from recbole_dpr.model import is_promptable
from recbole_dpr.train.checkpoints import replacing
from recbole_dpr.tuning.space import check_space, read_space
from recbole_dpr.yamlfile import read_yaml
from recbole_dpr.zoo import check_recipe, dataset_class

try:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator
except ImportError as error:
    raise UserError(f"recbole-dpr tune needs Ray ({error}): pip install 'ray[tune]'") from error

from recbole_dpr.tuning import report, trial

# ASHA looks at a trial after `grace_period` stages and each time that has doubled; the better half goes on. By default that is
# at the end of stages 1 and 2; for a RecBole model, which has one stage that early stopping usually cuts short, after
# 5, 10, 20, 40 ... epochs.
_REDUCTION, _FIRST_STAGES, _FIRST_EPOCHS = 2, 1, 5
_REACHING, _ANSWERING = 3, 30  # seconds that a Ray cluster has to take a connection, and to answer
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # asks nobody and sends nothing
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the command line's
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Search:
    """What was asked for; `search.yaml`.

    Attributes:
        model, dataset: names; settings: dict of keys, of files and command line; space: of `read_space`.
        trials: how many.
        cpus_per_trial, gpus_per_trial: numbers, shares of a GPU allowed; None for a GPU each where the cluster has any.
        max_concurrent_trials: 0 for as many as the cluster has room for.
        grace_period: stages that every trial gets before ASHA may stop it; None for the default above.
    """

    model: str
    dataset: str
    settings: dict
    space: dict
    trials: int
    cpus_per_trial: float = 1
    gpus_per_trial: float | None = None
    max_concurrent_trials: int = 0
    grace_period: float | None = None

    def __post_init__(self):
        if not (_is_whole(self.trials) and self.trials > 0):
            raise UserError(f"trials={self.trials!r}: a whole number from 1 is needed")
        if not (_is_number(self.cpus_per_trial) and self.cpus_per_trial > 0):
            raise UserError(f"cpus_per_trial={self.cpus_per_trial!r}: a number above 0 is needed")
        gpus = self.gpus_per_trial
        if gpus is not None and not (_is_number(gpus) and gpus >= 0 and (gpus <= 1 or float(gpus).is_integer())):
            raise UserError(f"gpus_per_trial={gpus!r}: a share of a GPU from 0 to 1, such as 0.5, or a whole number is needed")
        if not (_is_whole(self.max_concurrent_trials) and self.max_concurrent_trials >= 0):
            raise UserError(f"max_concurrent_trials={self.max_concurrent_trials!r}: a whole number is needed, 0 for no limit")
        if self.grace_period is not None and not (_is_number(self.grace_period) and self.grace_period > 0):
            raise UserError(f"grace_period={self.grace_period!r}: a number above 0 is needed, of stages: 0.5, 1, 2")


def search(model, dataset, params, trials, config_files=(), config_dict=None, address=None, **resources):
    """Search for the best settings of a model, on its validation score. The test part is not looked at.

    Args:
        model, dataset, config_files, config_dict: as of `run_dpr`.
        params: params file, see `recbole_dpr.tuning.space`.
        trials: how many settings are drawn.
        address: of a running Ray cluster, `host:port` or `auto`; None starts Ray on this machine.
        resources: `cpus_per_trial`, `gpus_per_trial`, `max_concurrent_trials`, `grace_period`, see `Search`.

    Returns:
        dict: "folder", "best" (the values of the best trial), "score", and "trials", the rows of trials.csv.

    Raises:
        UserError: an input that can be put right, in one line.
    """
    settings = dict(config_dict or {})
    model = model_name(model, config_files, settings)
    settings = merged_settings(model, config_files, settings)
    output_dir = settings.pop("output_dir", None)
    if settings.get("stage1_checkpoint"):  # trials have working directories of their own
        settings["stage1_checkpoint"] = str(Path(settings["stage1_checkpoint"]).resolve())
    config = make_config(model, dataset, (), settings)
    wanted = Search(model, dataset, settings, read_space(params), trials, **resources)
    check_space(wanted.space, model, dataset, settings)
    folder = Path(output_dir or Path(config["checkpoint_dir"]) / f"tune-{model}-{dataset}-{datetime.now():%Y%m%d-%H%M%S}")
    if (folder / "search.yaml").exists():
        raise UserError(f"output_dir={folder}: holds a search already; go on with --resume={folder}, or name another folder")
    with _cluster(address):
        return _run(wanted, folder)


def resume(folder, address=None):
    """Go on with a search whose driver has ended: trials go on from their last epoch, failed ones too. As `search`."""
    folder = Path(folder)
    try:
        wanted = Search(**read_yaml(folder / "search.yaml"))
    except (UserError, TypeError):
        raise UserError(f"resume={folder}: no search.yaml of a search there; name the folder of an interrupted search") from None
    with _cluster(address):
        return _run(wanted, folder)


def _run(wanted, folder):
    config = make_config(wanted.model, wanted.dataset, (), wanted.settings)
    show = bool(config["show_progress"])
    resources = _resources(wanted)
    task = _prepared(wanted, config, show)
    _write_yaml(folder / "search.yaml", dataclasses.asdict(wanted))
    trainable = tune.with_resources(tune.with_parameters(trial.run_trial, task=task), resources)  # `task` is stored once
    state, progress = str(folder.resolve() / "ray"), _Progress(wanted.trials, show)
    if tune.Tuner.can_restore(state):
        tuner = tune.Tuner.restore(state, trainable, resume_unfinished=True, resume_errored=True)
    else:
        tuner = _tuner(wanted, config, trainable, folder, progress)
    grid = tuner.fit()
    return _written(wanted, config, folder, grid)


def _prepared(wanted, config, show):
    """All that is read and embedded, for all trials: Task. The test queries stay out of it."""
    if is_promptable(wanted.model):
        materials, _ = prepare_prompts(config, read_sequences(config), show)
        data = dataclasses.replace(materials, test=[])
    else:
        check_recipe(config)
        data = read_dataset(config, dataset_class(config))
        data.config = None  # each trial has its own
    return trial.Task(wanted.model, wanted.dataset, wanted.settings, data)


def _tuner(wanted, config, trainable, folder, progress):
    stages = len(config["stages"]) if is_promptable(wanted.model) else 1
    default = _FIRST_STAGES if is_promptable(wanted.model) else _FIRST_EPOCHS / max(1, config["epochs"])
    return tune.Tuner(
        trainable,
        param_space=_domains(wanted.space),
        tune_config=tune.TuneConfig(
            metric=trial.SCORE,
            mode="max" if config["valid_metric_bigger"] else "min",
            num_samples=wanted.trials,
            search_alg=BasicVariantGenerator(random_state=config["seed"], max_concurrent=wanted.max_concurrent_trials),
            scheduler=_ASHA(
                time_attr=trial.PROGRESS,
                max_t=stages,
                grace_period=min(stages, wanted.grace_period or default),
                reduction_factor=_REDUCTION,
                stop_last_trials=False,  # True would fill a look that a short stage has skipped with scores of a later stage
            ),
            trial_dirname_creator=report.trial_name,
            trial_name_creator=report.trial_name,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(folder.resolve()),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            failure_config=tune.FailureConfig(max_failures=1),  # a lost worker
            callbacks=[progress],
            verbose=0,
        ),
    )


def _domains(space):
    makers = {"choice": tune.choice, "uniform": lambda ends: tune.uniform(*ends), "loguniform": lambda ends: tune.loguniform(*ends)}
    return {key: makers[name](values) for key, distribution in space.items() for name, values in distribution.items()}


def _written(wanted, config, folder, grid):
    rows = report.rows(grid, list(wanted.space))
    best = report.best_first(rows, config["valid_metric_bigger"])[0]
    if best["score"] is None or best["error"]:
        said = best["error"] or "none of them has validated an epoch"
        raise UserError(f"no trial of {folder} came to an end: {said}; the whole story is in {folder / 'ray'}/trial_*/error.txt")
    values = {key: best[key] for key in wanted.space}
    found = make_config(wanted.model, wanted.dataset, (), {**wanted.settings, **values})
    _write_yaml(folder / "best.yaml", settings_in_force(found))
    report.write(folder, wanted, rows, grid, config["valid_metric_bigger"])
    return {"folder": str(folder), "best": values, "score": best["score"], "trials": rows}


# --- Ray


@contextmanager
def _cluster(address):
    """Ray on this machine, or the connection to a running cluster, for as long as the block lasts."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address:
        _check_address(address)
    try:
        # "local", as Ray would else join whatever cluster it finds; without a dashboard, which only local Ray may be told
        ray.init(address or "local", logging_level=logging.ERROR, log_to_driver=False, **({} if address else {"include_dashboard": False}))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"{f'address={address}' if address else 'Ray does not start'}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address):
    """Refuse within seconds what `ray.init` would try for minutes before it ends the process."""
    way_out = "start a cluster with 'ray start --head' and name its host:port, or leave --address out for Ray on this machine"
    if address.startswith("ray://"):
        raise UserError(f"address={address}: a search runs on a machine of the cluster, not through Ray Client; give its host:port, or auto")
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"address={address}: host:port of a running Ray cluster is needed, or auto")
        try:
            socket.create_connection((host, int(port)), timeout=_REACHING).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"address={address}: no Ray cluster there ({error}); {way_out}") from None
    connect = "import sys, ray; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False)"
    try:
        tried = subprocess.run([sys.executable, "-c", connect, address], capture_output=True, text=True, timeout=_ANSWERING)
    except subprocess.TimeoutExpired:
        raise UserError(f"address={address}: no Ray cluster answers there within {_ANSWERING} seconds; {way_out}") from None
    if "AuthToken" in tried.stderr:  # Ray sends its token to an address only if it is told to
        raise UserError(f"address={address}: the cluster wants a token that was not given, or another one; set RAY_AUTH_MODE=token, see Ray's token-auth page")
    if tried.returncode:
        raise UserError(f"address={address}: {(tried.stderr.splitlines() or ['no answer'])[-1]}; {way_out}")


def _resources(wanted):
    """What a trial takes, as Ray wants it said; a UserError where the cluster never has it free."""
    has = ray.cluster_resources()
    gpus = wanted.gpus_per_trial
    if gpus is None:
        gpus = 1 if has.get("GPU") else 0
    for name, needed in (("CPU", wanted.cpus_per_trial), ("GPU", gpus)):
        if needed > has.get(name, 0):
            raise UserError(f"{name.lower()}s_per_trial={needed}: the Ray cluster has {has.get(name, 0):g}; give fewer")
    return {"cpu": wanted.cpus_per_trial, "gpu": gpus}


class _ASHA(ASHAScheduler):
    """ASHA that Ray may restore: Ray brings the trials back and not what their scheduler knew, so they tell it again."""

    def on_trial_add(self, tune_controller, trial):
        super().on_trial_add(tune_controller, trial)
        if trial.has_reported_at_least_once:  # one that has not been started has no folder
            for metrics in report.told(Path(trial.path)):
                self.on_trial_result(tune_controller, trial, metrics)


class _Progress(tune.Callback):
    """One bar over all trials, and a line for each that has ended."""

    def __init__(self, trials, show):
        self.trials, self.show = trials, show

    def setup(self, **info):
        self.bar = report.progress_bar(self.trials, self.show)

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.bar.set_postfix_str(report.standing(trial, result), refresh=False)
        self.bar.update(sum(t.is_finished() for t in trials) - self.bar.n)
        self.bar.refresh()

    def on_trial_complete(self, iteration, trials, trial, **info):
        self._ended(trials, report.outcome(trial))

    def on_trial_error(self, iteration, trials, trial, **info):
        self._ended(trials, f"{trial} failed: {trial.error_file}")

    def on_experiment_end(self, trials, **info):
        self.bar.close()

    def _ended(self, trials, line):
        if self.show:
            self.bar.write(line)
        self.bar.update(sum(t.is_finished() for t in trials) - self.bar.n)


# --- helpers


def _write_yaml(path, content):
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
