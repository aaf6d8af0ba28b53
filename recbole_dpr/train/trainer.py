"""One stage of training on RecBole's Trainer: its loop and early stopping, our batches and checkpoints."""

import math
from pathlib import Path

import numpy as np
import torch
from recbole.trainer import Trainer
from tqdm import tqdm

from recbole_dpr import distributed
from recbole_dpr.compat import tensorboard_in
from recbole_dpr.train import checkpoints

_REPORT_EVERY = 20  # steps between two looks at the loss: each look waits for the device


class StageTrainer(Trainer):
    """RecBole's Trainer for one stage.

    Randomness is set anew at each epoch from (seed, stage, epoch), so an epoch does not depend on what ran before
    it in this process: a resumed run repeats an uninterrupted one bit for bit (on one machine's CPU).

    Args:
        config: recbole Config; model: Promptable.
        stage: number of the stage; 2 and 3 train the prompted path, any other the unprompted backbone. settings: its keys.
        validate: () -> dict metric name -> value, with the key "score" that early stopping follows.
        folder: where `stage<n>.last.pt` and `stage<n>.best.pt` go; identity: what they note of the data.
        name: of a stage that is none of DPR's own, for these files and the history.
        loss: PackedBatch -> tuple of losses; default the model's `calculate_loss`.
    """

    def __init__(self, config, model, stage, settings, validate, folder, identity, name=None, loss=None):
        self.stage, self.settings, self.validate, self.identity = stage, settings, validate, identity
        self.name, self.loss = name, loss or model.calculate_loss
        self.title = name or f"stage {stage}"
        self.trains_prompts = stage in (2, 3)
        self.best_file, self.last_file = (Path(folder) / f"{name or f'stage{stage}'}.{kind}.pt" for kind in ("best", "last"))
        self.history, self.last_result = [], {}
        self.on_epoch = None
        with tensorboard_in(Path(folder) / "tensorboard" if distributed.is_first() else None):
            super().__init__(config, model)
        self.epochs = min(settings["epochs"], config["epochs"])
        self.eval_step = min(config["eval_step"], max(1, self.epochs))
        self.stopping_step = settings["stopping_step"]
        self.finished = False

    def _build_optimizer(self, **kwargs):
        """Adam (or RecBole's `learner`) with a learning rate for the backbone and one for what DPR adds."""
        rate, model = self.settings["learning_rate"], self.model
        groups = [{"params": model.backbone_parameters(), "lr": rate}]
        if self.trains_prompts:
            groups = [{"params": model.fusion_parameters(), "lr": rate}]
            if self.settings["backbone_learning_rate"]:
                groups.append({"params": model.answering_parameters(), "lr": self.settings["backbone_learning_rate"]})
        optimizer = super()._build_optimizer(params=groups, learning_rate=rate)
        if type(optimizer) is not torch.optim.Adam:
            return optimizer
        # one pass over the weights instead of a dozen; a stage begun before this was so goes on as it was
        kept = ("params", "lr", "weight_decay")
        return torch.optim.Adam([{key: group[key] for key in kept} for group in optimizer.param_groups], fused=True)

    def _set_learning_rates(self, epoch):
        """Cosine decay towards 0 over the stage's epochs, or the constant rates of the settings."""
        cosine = self.settings["schedule"] == "cosine"
        factor = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs)) if cosine else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])

    def run(self, train_data, show_progress=False, on_epoch=None):
        """Train to the end of the stage, going on from its last checkpoint if there is one; leaves the best weights.

        Args:
            on_epoch: called with this trainer after each epoch, whose checkpoint is on disk by then.

        Returns:
            list of one dict per epoch: stage, epoch, loss and the validation metrics.
        """
        self.on_epoch = on_epoch
        if self.last_file.exists():
            self._resume()
        if not self.finished and self.start_epoch < self.epochs:
            self.fit(train_data, valid_data=self.validate, verbose=False, show_progress=show_progress, callback_fn=self._after_epoch)
        if not self.finished:
            self.finished = True
            if self.history:
                self._save_last()
        self.model.forget_texts()
        if self.best_file.exists():
            self.model.load_state_dict(checkpoints.load(self.best_file, self.device)["state_dict"])
        return self.history

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        self.model.train()
        self.model.train_backbone = not self.trains_prompts or bool(self.settings["backbone_learning_rate"])
        self.model.prompt_noise = self.settings.get("prompt_noise", 0.0)
        stream = [self.config["seed"], self.stage, epoch_idx]
        if not distributed.is_first():
            stream.append(distributed.rank())  # dropout of its own
        torch.manual_seed(np.random.SeedSequence(stream).generate_state(1)[0])
        self._set_learning_rates(epoch_idx)
        self.model.forget_texts()
        train_data.epoch = epoch_idx
        bar = tqdm(train_data, desc=f"{self.title} epoch {epoch_idx + 1}/{self.epochs}", disable=not show_progress, leave=False)
        total, steps = torch.zeros((), device=self.device), 0
        number, n_parts = distributed.rank(), distributed.world_size()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for batch in bar:
            if n_parts > 1:
                batch = batch.part(number, n_parts)
            self.optimizer.zero_grad(set_to_none=True)
            losses = self.loss(batch.to(self.device)) if len(batch.rows) else ()
            loss = sum(losses, start=torch.zeros((), device=self.device))
            if loss.requires_grad:
                loss.backward()
            distributed.sum_gradients(parameters)
            if self.clip_grad_norm:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), **self.clip_grad_norm)
            self.optimizer.step()
            total += loss.detach()
            steps += 1
            if steps % _REPORT_EVERY == 0:
                self._check_nan(total)
                bar.set_postfix(loss=f"{n_parts * total.item() / steps:.4f}")  # of this process's part, which weighs its share
        distributed.summed(total)
        self._check_nan(total)
        return total.item() / max(1, steps)

    def _valid_epoch(self, valid_data, show_progress=False):
        self.last_result = valid_data()
        return self.last_result["score"], self.last_result

    def _after_epoch(self, epoch, score):
        """Note the epoch and keep it on disk: what is lost by an interruption is at most one epoch."""
        result = self.last_result
        self.history.append({"stage": self.name or self.stage, "epoch": epoch, "loss": self.train_loss_dict[epoch], **result})
        self.finished = self.cur_step > self.stopping_step
        self._save_last()
        shown = "  ".join(f"{name} {value:.4f}" for name, value in result.items() if name != "score")
        if self.config["show_progress"]:
            loss = self.train_loss_dict[epoch]
            tqdm.write(f"{self.title} epoch {epoch + 1}/{self.epochs}  loss {loss:.4f}  {shown}")
        if self.on_epoch:
            self.on_epoch(self)

    def _save_checkpoint(self, epoch, verbose=True, **kwargs):
        """The best epoch so far; RecBole's loop calls this."""
        if epoch >= 0:
            checkpoints.save(self.best_file, {"identity": self.identity, "epoch": epoch, "state_dict": self.model.state_dict()})

    def _save_last(self):
        state = {
            "identity": self.identity,
            "epoch": self.history[-1]["epoch"],
            "finished": self.finished,
            "cur_step": self.cur_step,
            "best_valid_score": float(self.best_valid_score),
            "history": self.history,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        checkpoints.save(self.last_file, state)

    def _resume(self):
        state = checkpoints.load(self.last_file, self.device)
        checkpoints.check_identity(state, self.identity, self.last_file)
        self.start_epoch = state["epoch"] + 1
        self.cur_step, self.best_valid_score = state["cur_step"], state["best_valid_score"]
        self.history, self.finished = state["history"], state["finished"]
        self.model.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
