"""What takes minutes and Ray processes of its own: a killed driver, and a cluster that was started apart.

    PYTHONPATH=. python tests/ray_checks.py [--ml-100k] [killed_driver] [separate_cluster]

On the tiny dataset with two or three trials; with --ml-100k on that, with eight.
"""

import csv
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tiny
import yaml

from recbole_dpr.errors import UserError
from recbole_dpr.tuning import report
from recbole_dpr.tuning.search import _check_address

ROOT = Path(__file__).parent.parent
EPOCHS = {"stage1": 20, "stage2": 6, "stage3": 6}
COMMAND = [sys.executable, "-c", "import sys; from recbole_dpr.cli import main; sys.exit(main(['tune', *sys.argv[1:]]))"]


@dataclass
class Search:
    """A search in DPR_SASRec.

    Attributes:
        arguments: of the command; data: those that a search in another model takes as well, to which its params come.
        trials: how many; killed_at: epochs of the trial in the middle after which the driver is killed.
    """

    arguments: list
    data: list
    trials: int
    killed_at: int


def prepare_ml_100k(place):
    """Two epochs of a stage."""
    (place / "dpr.params").write_text("stage1.learning_rate loguniform -8,-4\nfusion_heads choice [1,2]\n")
    (place / "bpr_params.yaml").write_text("learning_rate: {loguniform: [1e-4, 1e-1]}\n")
    data = ["--dataset=ml-100k", "--epochs=2"]
    return Search(["--model=DPR_SASRec", *data, f"--params={place / 'dpr.params'}"], data, trials=8, killed_at=1)  # trials may end with stage 1


def prepare(place):
    """The tiny dataset, configs and params files."""
    tiny.write(place)
    stages = {name: {"epochs": epochs, "stopping_step": 99} for name, epochs in EPOCHS.items()}
    settings = tiny.settings(place, item_texts=str(tiny.write_texts(place)), train_batch_size=500, **stages)
    (place / "dpr.yaml").write_text(yaml.safe_dump(settings))
    (place / "bpr.yaml").write_text(yaml.safe_dump(tiny.settings(place, "BPR", epochs=8)))
    (place / "dpr.params").write_text("stage1.learning_rate loguniform -8,-4\nhidden_size choice [16,32]\n")
    (place / "bpr_params.yaml").write_text("learning_rate: {loguniform: [1e-4, 1e-1]}\n")
    arguments = ["--model=DPR_SASRec", "--dataset=tiny", f"--config_files={place / 'dpr.yaml'}", f"--params={place / 'dpr.params'}"]
    return Search(arguments, ["--dataset=tiny", f"--config_files={place / 'bpr.yaml'}"], trials=3, killed_at=4)


# the clusters of these checks are closed to others, by a token of their own
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def told(folder, number):
    """What a trial has reported so far: list of dicts."""
    return report.told(folder / "ray" / f"trial_{number}")


def rows(folder):
    with open(folder / "trials.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def killed_driver(place, search):
    """The trial in the middle is half-way when the driver gets SIGKILL; the resumed search goes on from there."""
    folder, middle = place / "killed", search.trials // 2
    more = [f"--trials={search.trials}", "--max_concurrent_trials=1", f"--output_dir={folder}"]
    driver = subprocess.Popen([*COMMAND, *search.arguments, *more], env=environment())
    while len(told(folder, middle)) < search.killed_at:
        assert driver.poll() is None, "the search ended before it could be killed"
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    *ended, before = [told(folder, number) for number in range(middle + 1)]
    print(f"killed after {len(before)} epochs of trial {middle}")
    assert not (folder / "best.yaml").exists()

    subprocess.run([*COMMAND, f"--resume={folder}"], env=environment(), check=True)
    assert [told(folder, number) for number in range(middle)] == ended, "a finished trial was trained again"
    after = told(folder, middle)
    assert after[: len(before)] == before
    epochs = [(row["stage"], row["epoch"]) for row in after]
    assert len(epochs) - len(set(epochs)) <= 1, f"more than one epoch was trained twice: {epochs}"
    assert [row["trial"] for row in rows(folder)] == [str(number) for number in range(search.trials)]
    assert all(row["score"] and not row["error"] for row in rows(folder)) and (folder / "best.yaml").exists()


def answers(address):
    try:
        _check_address(address)
    except UserError:
        return False
    return True


def separate_cluster(place, search):
    """A search for a DPR model and one for a model of RecBole on a cluster that `ray start --head` has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    head = subprocess.Popen([sys.executable, *start], env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not answers(f"127.0.0.1:{port}"):
            assert head.poll() is None, "ray start has ended"
            time.sleep(1)
        bpr = ["--model=BPR", *search.data, f"--params={place / 'bpr_params.yaml'}"]
        for name, arguments, trials in (("dpr", search.arguments, search.trials), ("bpr", bpr, 2)):
            folder = place / name
            more = [f"--address=127.0.0.1:{port}", f"--trials={trials}", f"--output_dir={folder}"]
            subprocess.run([*COMMAND, *arguments, *more], env=environment(), check=True)
            assert len(rows(folder)) == trials and any(row["score"] for row in rows(folder))
            assert f"--dataset={yaml.safe_load((folder / 'best.yaml').read_text())['dataset']}" == search.data[0]
        assert head.poll() is None, "the search has ended the cluster"
    finally:
        head.terminate()
        head.wait()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        names = [argument for argument in sys.argv[1:] if argument != "--ml-100k"]
        search = (prepare if names == sys.argv[1:] else prepare_ml_100k)(Path(work))
        for check in [globals()[name] for name in names] or (killed_driver, separate_cluster):
            started = time.perf_counter()
            check(Path(work), search)
            print(f"{check.__name__}: passed in {time.perf_counter() - started:.0f} s")
