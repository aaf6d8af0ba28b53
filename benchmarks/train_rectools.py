"""RecTools' SASRec for benchmarks/train.py, in an environment of its own (it needs other versions of NumPy and pandas).

    python benchmarks/train_rectools.py FILE HISTORY BATCH_SIZE SECONDS

FILE is an .npz with user, item and time of the training part. Trains on sequences padded to HISTORY and prints, as the last
line, JSON: targets (real ones, padding apart), seconds, and what the data took. The first _WARM_UP steps do not count.
"""

import json
import sys
import time

import numpy as np
import pandas as pd
import rectools
import torch
from pytorch_lightning import Callback, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

_WARM_UP = 3


class _Clock(Callback):
    """Counts targets and ends the training when its time is over."""

    def __init__(self, limit):
        self.limit, self.targets, self.steps, self.start, self.end = limit, 0, 0, None, None

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.steps += 1
        self.end = time.perf_counter()
        if self.start is None:
            if self.steps == _WARM_UP:
                self.start = self.end
            return
        self.targets += int((batch["y"] != 0).sum())
        trainer.should_stop = trainer.should_stop or self.end - self.start > self.limit


def main(file, history, batch_size, limit):
    began = time.perf_counter()
    table = pd.DataFrame({name: values for name, values in np.load(file).items()})
    table[Columns.Datetime] = pd.to_datetime(table.pop("time"), unit="s")
    table = table.rename(columns={"user": Columns.User, "item": Columns.Item}).assign(**{Columns.Weight: 1.0})
    clock = _Clock(limit)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    model = SASRecModel(
        n_factors=64, n_blocks=2, n_heads=2, dropout_rate=0.2, loss="softmax", session_max_len=history, batch_size=batch_size,
        get_trainer_func=lambda: Trainer(max_epochs=1000, min_epochs=0, accelerator="cpu", callbacks=[clock], **quiet),
    )  # fmt: skip
    dataset = Dataset.construct(table)
    prepared = time.perf_counter() - began
    model.fit(dataset)
    # `fit` copies the trainer, callbacks included
    clock = next(callback for callback in model.fit_trainer.callbacks if isinstance(callback, _Clock))
    found = {"targets": clock.targets, "seconds": clock.end - clock.start, "data": prepared}
    print(json.dumps({**found, "versions": f"RecTools {rectools.__version__ if hasattr(rectools, '__version__') else rectools.VERSION}, torch {torch.__version__}"}))


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
