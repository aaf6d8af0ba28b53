"""The console command `recbole-dpr`: arguments -> functions, errors -> one clear line and exit code 2."""

import os
import shlex
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
      --resume=FOLDER     go on with an interrupted run (alone, or with settings to change)
      --nproc=K           K processes on one run, a GPU each or on the CPU; of RecBole also --world_size= --ip= --port= --group_offset=
      any other key of properties/dpr.yaml or RecBole; a key of a stage as --stage3.epochs=4
  recbole-dpr benchmark --models=A,B,C --dataset=NAME [--ablations[=a,b]] [--seeds=1,2,3] [--key=value ...]
      one table over models, the paper's baselines of each DPR model, and ablations: Markdown, CSV, a figure
      --models=           names as for run; DPR over another backbone as DPR_NARM
      --ablations         all of properties/ablations.yaml, or those named; of every DPR model, or of those that --ablated= names
      --output_dir=FOLDER where the runs and the table go (default saved/benchmark-<dataset>); the same command again
                          takes over what has ended there and goes on with what was interrupted
      any other key as for run; each model gets those that it knows; --per_model='{SASRec: {epochs: 20}}' is for some alone
  recbole-dpr recommend FOLDER [--history=ID,ID,... | --user=ID] [--prompt="TEXT"] [--k=10] [--strength=1]
      lists without and with a prompt side by side, from the folder of a finished run; without a history for a new user
      --strength=S        0 the plain recommender, 1 as trained, 2 twice that; --prompt_encoder=FOLDER where it now lies
      --intent_router=R   what splits the prompt into clauses: tagger, nli (with --intent_model=NAME) or cues (docs/router.md)
  recbole-dpr demo FOLDER [--host=127.0.0.1] [--port=7860] [--prompt_encoder=FOLDER] [--intent_router=R]
      a web page: pick a user or build a history, type wishes, see both lists
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
        way_on = "give the same command again" if argv[0] == "benchmark" else "go on with --resume=FOLDER"
        print(f"\nrecbole-dpr: interrupted; the last checkpoint is intact, {way_on}", file=sys.stderr)
        return 130


def parse_settings(argv, as_text=("model", "dataset", "config_files")):
    """`--key=value` arguments -> dict; values are read as YAML, never evaluated, those of the keys `as_text` not even that.

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
        settings[key] = value if key in as_text else parse_value(value)
    return settings


def _run(argv):
    settings = parse_settings(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from recbole_dpr.run import begun, run_dpr

    default = begun(settings["resume"]) if settings.get("resume") else ("DPR_SASRec", "ml-100k")
    model, dataset = settings.pop("model", default[0]), settings.pop("dataset", default[1])
    files = settings.pop("config_files", "").split()
    result = run_dpr(model, dataset, files, settings)
    from recbole_dpr.evaluation.report import table

    print()
    print(table(result))
    print(f"written: {result['folder']}")


def _benchmark(argv):
    settings = parse_settings(["--ablations=all" if argument == "--ablations" else argument for argument in argv])
    models, dataset = settings.pop("models", ""), settings.pop("dataset", "ml-100k")
    ablations, ablated, seeds = settings.pop("ablations", None), settings.pop("ablated", ()), settings.pop("seeds", ())
    files = settings.pop("config_files", "").split()
    warnings.filterwarnings("ignore", category=FutureWarning)
    from recbole_dpr.benchmark import run_benchmark

    command = shlex.join(["recbole-dpr", "benchmark", *argv])
    folder = run_benchmark(models, dataset, ablations, seeds, files, settings, command, ablated)
    print()
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"written: {folder}")


_SERVING_TEXT = ("history", "user", "prompt", "prompt_encoder", "intent_router", "intent_model", "host")  # ids and words: 007 and yes are no numbers or truths

_LOADED_WITH = ("prompt_encoder", "intent_router", "intent_model", "unprompted_weight")


def _serving_arguments(command, argv, keys):
    """FOLDER --key=value ... -> the loaded Recommender, and the settings."""
    if not argv or argv[0].startswith("--"):
        raise UserError(f"{command}: name the folder of a finished run first, as in recbole-dpr {command} saved/DPR_SASRec-ml-100k-...")
    settings = parse_settings(argv[1:], _SERVING_TEXT)
    for key in settings:
        if key not in keys:
            raise unknown("option", f"--{key}", [f"--{valid}" for valid in keys])
    warnings.filterwarnings("ignore", category=FutureWarning)
    from recbole_dpr.serving.recommender import load

    return load(argv[0], **{key: settings.pop(key) for key in _LOADED_WITH if key in settings}), settings


def _recommend(argv):
    rec, settings = _serving_arguments("recommend", argv, ("history", "user", "prompt", "k", "strength", *_LOADED_WITH))
    from recbole_dpr.serving.terminal import comparison

    if "user" in settings and "history" in settings:
        raise UserError("--user= and --history=: give one of them")
    history = rec.history(settings["user"]) if "user" in settings else settings.get("history", "").replace(",", " ").split()
    shown = comparison(rec, history, settings.get("prompt"), settings.get("k", 10), settings.get("strength", 1.0))
    encoding = sys.stdout.encoding or "utf-8"  # a terminal without the arrows shows ? for them
    print(shown.encode(encoding, "replace").decode(encoding))


def _demo(argv):
    rec, settings = _serving_arguments("demo", argv, ("host", "port", *_LOADED_WITH))
    from recbole_dpr.serving.demo import launch

    launch(rec, **settings)


_TRIAL_KEYS = ("cpus_per_trial", "gpus_per_trial", "max_concurrent_trials", "grace_period")


def _tune(argv):
    settings = parse_settings(argv, ("model", "dataset", "config_files", "params", "address", "resume"))
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


_COMMANDS = {"run": _run, "benchmark": _benchmark, "tune": _tune, "recommend": _recommend, "demo": _demo, "doctor": _doctor}
