"""What takes minutes and Ray processes of its own: a killed driver, and a cluster that was started apart. On the tiny dataset.

    PYTHONPATH=. python tests/ray_checks.py [killed_driver] [separate_cluster]
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
from pathlib import Path

import tiny
import yaml

from recbole_dpr.errors import UserError
from recbole_dpr.tuning import report
from recbole_dpr.tuning.search import _check_address

ROOT = Path(__file__).parent.parent
EPOCHS = {"stage1": 20, "stage2": 6, "stage3": 6}
COMMAND = [sys.executable, "-c", "import sys; from recbole_dpr.cli import main; sys.exit(main(['tune', *sys.argv[1:]]))"]


def prepare(place):
    """The tiny dataset, a config and two params files; returns the arguments of a search in DPR_SASRec."""
    tiny.write(place)
    stages = {name: {"epochs": epochs, "stopping_step": 99} for name, epochs in EPOCHS.items()}
    settings = tiny.settings(place, item_texts=str(tiny.write_texts(place)), train_batch_size=500, **stages)
    (place / "dpr.yaml").write_text(yaml.safe_dump(settings))
    (place / "bpr.yaml").write_text(yaml.safe_dump(tiny.settings(place, "BPR", epochs=8)))
    (place / "dpr.params").write_text("stage1.learning_rate loguniform -8,-4\nhidden_size choice [16,32]\n")
    (place / "bpr_params.yaml").write_text("learning_rate: {loguniform: [1e-4, 1e-1]}\n")
    return ["--model=DPR_SASRec", "--dataset=tiny", f"--config_files={place / 'dpr.yaml'}", f"--params={place / 'dpr.params'}"]


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


def killed_driver(place, arguments):
    """Trial 1 of 3 is half-way when the driver gets SIGKILL; the resumed search goes on from there."""
    folder = place / "killed"
    driver = subprocess.Popen([*COMMAND, *arguments, "--trials=3", "--max_concurrent_trials=1", f"--output_dir={folder}"], env=environment())
    while len(told(folder, 1)) < 4:
        assert driver.poll() is None, "the search ended before it could be killed"
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = [told(folder, 0), told(folder, 1)]
    print(f"killed after {len(before[0])} epochs of trial 0 and {len(before[1])} of trial 1")
    assert not (folder / "best.yaml").exists()

    subprocess.run([*COMMAND, f"--resume={folder}"], env=environment(), check=True)
    assert told(folder, 0) == before[0], "a finished trial was trained again"
    after = told(folder, 1)
    assert after[: len(before[1])] == before[1]
    epochs = [(row["stage"], row["epoch"]) for row in after]
    assert len(epochs) - len(set(epochs)) <= 1, f"more than one epoch was trained twice: {epochs}"
    assert [row["trial"] for row in rows(folder)] == ["0", "1", "2"]
    assert all(row["score"] and not row["error"] for row in rows(folder)) and (folder / "best.yaml").exists()


def answers(address):
    try:
        _check_address(address)
    except UserError:
        return False
    return True


def separate_cluster(place, arguments):
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
        bpr = ["--model=BPR", "--dataset=tiny", f"--config_files={place / 'bpr.yaml'}", f"--params={place / 'bpr_params.yaml'}"]
        for name, search in (("dpr", arguments), ("bpr", bpr)):
            folder = place / name
            more = [f"--address=127.0.0.1:{port}", "--trials=2", f"--output_dir={folder}"]
            subprocess.run([*COMMAND, *search, *more], env=environment(), check=True)
            assert len(rows(folder)) == 2 and any(row["score"] for row in rows(folder))
            assert yaml.safe_load((folder / "best.yaml").read_text())["dataset"] == "tiny"
        assert head.poll() is None, "the search has ended the cluster"
    finally:
        head.terminate()
        head.wait()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        usual = prepare(Path(work))
        for check in [globals()[name] for name in sys.argv[1:]] or (killed_driver, separate_cluster):
            started = time.perf_counter()
            check(Path(work), usual)
            print(f"{check.__name__}: passed in {time.perf_counter() - started:.0f} s")
