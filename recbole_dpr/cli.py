"""The console command `recbole-dpr`: arguments -> functions, errors -> one clear line and exit code 2."""

import os
import sys
import traceback
import warnings
from pathlib import Path

from recbole_dpr.errors import UserError, unknown

_HELP = """recbole-dpr: promptable sequential recommendation for RecBole

  recbole-dpr run --model=NAME --dataset=NAME [--config_files="a.yaml b.yaml"] [--key=value ...]
      train and evaluate one model (python run_dpr.py does the same)
      NAME of a model: DPR_SASRec, DPR_GRU4Rec, DPR_BERT4Rec, DPR with --backbone=NAME (any sequential model of RecBole
      that docs/backbones.md lists as working), or any model of RecBole
      --epochs=K          caps the epochs of every stage
      --data_path=FOLDER  folder above the dataset's own folder
      --output_dir=FOLDER where the run goes (default saved/<model>-<dataset>-<time>)
      --resume=FOLDER     go on with an interrupted run
      any other key of properties/dpr.yaml or RecBole; a key of a stage as --stage3.epochs=4
  recbole-dpr tune --model=NAME --dataset=NAME --params=FILE --trials=N [--config_files=...] [--key=value ...]
      search for settings with Ray Tune (pip install 'ray[tune]'), on the validation score; keys as of run, for all trials
      FILE: lines in RecBole's format ('hidden_size choice [64,128]', 'stage3.learning_rate loguniform -8,-4': exponents of e),
      or .yaml ('hidden_size: {choice: [64, 128]}'); choice, uniform, quniform, loguniform
      --address=HOST:PORT a running Ray cluster, or auto; default: Ray on this machine
      --cpus_per_trial=1 --gpus_per_trial=0.5 --max_concurrent_trials=0
      --grace_period=1    stages that every trial gets before it may be stopped for being worse than others (ASHA)
      --resume=FOLDER     go on with an interrupted search (alone, or with --address=)
  recbole-dpr doctor
      versions, patches applied, what is missing and how to install it
"""


def main(argv=None):
    """Run one command. Returns the exit code: 0 done, 2 a wrong input (one line says which), 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or "--help" in argv or argv[0] in ("-h", "help"):
            print(_HELP, end="")
            return 0 if argv else 2
        if argv[0] not in _COMMANDS:
            raise unknown("command", argv[0], _COMMANDS, "see recbole-dpr --help")
        _COMMANDS[argv[0]](argv[1:])
        return 0
    except UserError as error:
        print(f"recbole-dpr: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if os.environ.get("RECBOLE_DPR_DEBUG"):
            traceback.print_exc()
        print(f"recbole-dpr: {error.filename or 'a file'}: {error.strerror or error}; RECBOLE_DPR_DEBUG=1 shows where", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrecbole-dpr: interrupted; the last checkpoint is intact, go on with --resume=FOLDER", file=sys.stderr)
        return 130


def parse_settings(argv):
    """`--key=value` arguments -> dict; values are read as YAML, never evaluated.

    >>> parse_settings(["--epochs=3", "--windows=[3,5]"])
    {'epochs': 3, 'windows': [3, 5]}
    """
    from recbole_dpr.yamlfile import parse_value

    settings = {}
    for argument in argv:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or not key:
            raise UserError(f"argument '{argument}': the form --key=value is needed, such as --epochs=3 (see --help)")
        if key in settings:
            raise UserError(f"argument '{argument}': --{key}= is given twice")
        settings[key] = value if key in ("model", "dataset", "config_files", "params", "address", "resume") else parse_value(value)
    return settings


def _run(argv):
    settings = parse_settings(argv)
    model, dataset = settings.pop("model", "DPR_SASRec"), settings.pop("dataset", "ml-100k")
    files = settings.pop("config_files", "").split()
    warnings.filterwarnings("ignore", category=FutureWarning)
    from recbole_dpr.run import run_dpr

    result = run_dpr(model, dataset, files, settings)
    from recbole_dpr.evaluation.report import table

    print()
    print(table(result))
    print(f"written: {result['folder']}")


_TRIAL_KEYS = ("cpus_per_trial", "gpus_per_trial", "max_concurrent_trials", "grace_period")


def _tune(argv):
    settings = parse_settings(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from recbole_dpr.tuning.search import resume, search

    address = settings.pop("address", None)
    if "resume" in settings:
        folder = settings.pop("resume")
        if settings:
            raise UserError(f"argument '--{next(iter(settings))}': a resumed search takes all but --address= from {folder}/search.yaml")
        found = resume(folder, address)
    else:
        for key in ("params", "trials"):
            if key not in settings:
                raise UserError(f"tune needs --{key}=, see recbole-dpr --help")
        model, dataset = settings.pop("model", "DPR_SASRec"), settings.pop("dataset", "ml-100k")
        files, params, trials = settings.pop("config_files", "").split(), settings.pop("params"), settings.pop("trials")
        resources = {key: settings.pop(key) for key in _TRIAL_KEYS if key in settings}
        found = search(model, dataset, params, trials, files, settings, address, **resources)
    print()
    print(Path(found["folder"], "trials.md").read_text(encoding="utf-8"))
    print(f"written: {found['folder']}; the best trial's settings: --config_files={found['folder']}/best.yaml")


def _doctor(argv):
    from recbole_dpr.doctor import main as doctor

    if argv:
        raise UserError(f"doctor takes no arguments, not '{argv[0]}'")
    doctor()


_COMMANDS = {"run": _run, "tune": _tune, "doctor": _doctor}
