"""RecBole's own models: trained by RecBole's recipe on our split, measured on our evaluation sets.

Legend: B queries of a batch, V items, L = MAX_ITEM_LIST_LENGTH.
"""

import time
from contextlib import contextmanager

import numpy as np
import recbole.data.dataset
import torch
from recbole.data.dataset import KnowledgeBasedDataset
from recbole.data.interaction import Interaction
from recbole.data.utils import create_samplers, get_dataloader
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.sampler import KGSampler
from recbole.utils import ModelType, get_trainer, init_seed
from tqdm import tqdm

from recbole_dpr.compat import tensorboard_in
from recbole_dpr.data.dataset import ChronologicalSplit, FlatDataset, PrefixDataset, build_sequences
from recbole_dpr.errors import UserError
from recbole_dpr.evaluation import methods, report
from recbole_dpr.evaluation.evaluator import Evaluator
from recbole_dpr.evaluation.queries import PROTOCOL_KEYS
from recbole_dpr.materials import prepare_queries, read_dataset
from recbole_dpr.run import machine, peak_memory_mb, versions, write_results
from recbole_dpr.train import checkpoints

_PAIRS = 2**18  # (query, item) pairs at once for models that score pair by pair: bounds the copies of the histories


def run_recbole_model(config, folder):
    """Train a model of RecBole and measure it, alone and behind the category filter.

    Args:
        config: recbole Config; folder: Path of the run; training goes on from a checkpoint that lies in it.

    Returns:
        The dict that metrics.json holds, and "folder".

    Raises:
        UserError: the model cannot work with this data.
    """
    name, show, seconds = config["model"], bool(config["show_progress"]), {}
    check_recipe(config)
    init_seed(config["seed"], config["reproducibility"])
    with _timed(seconds, "data"):
        dataset = read_dataset(config, dataset_class(config))
        sequences = build_sequences(dataset)
        test = prepare_queries(config, sequences).test
    if show:
        print(f"{config['dataset']}: " + ", ".join(f"{n:,} {what}" for what, n in sequences.stats().items()), flush=True)
    with _in_one_line(config):
        with _timed(seconds, "train"):
            model = RecBoleModel(config, dataset, sequences, folder / "checkpoints")
            history = model.train(show)
        with _timed(seconds, "evaluate"):
            evaluator = Evaluator(sequences, config)
            only_category = methods.Filter(model, torch.from_numpy(sequences.categories).to(config["device"]))
            results = evaluator.rows(name, model, test)
            results += evaluator.rows(f"Filter {name}", only_category, [p for p in test if p.kind != "none"])
    result = {
        **{"model": name, "dataset": config["dataset"], "seed": config["seed"]},
        "versions": versions(),
        "machine": machine(),
        "protocol": {key: config[key] for key in PROTOCOL_KEYS},
        "dataset_stats": sequences.stats(),
        "seconds": {chapter: round(value, 1) for chapter, value in seconds.items()},
        "peak_memory_mb": peak_memory_mb(),
        "training": model.training,
        "history": history,
        "results": results + report.averages(results),
    }
    if history and model.training:
        report.plot_curves(folder / "curves.png", history)
    write_results(folder, result, evaluator.scored)
    return {**result, "folder": str(folder)}


def train_only(config, folder, dataset, on_epoch):
    """The training of a RecBole model without its test, on data that were read before: a trial of a search.

    Args:
        config: recbole Config; folder: Path; a checkpoint that lies in it is gone on from.
        dataset: of `read_dataset` with `dataset_class`; it is changed.
        on_epoch: as of `RecBoleModel.train`.
    """
    init_seed(config["seed"], config["reproducibility"])
    with _in_one_line(config):
        RecBoleModel(config, dataset, build_sequences(dataset), folder / "checkpoints").train(on_epoch=on_epoch)


class RecBoleModel:
    """A model of RecBole as a method of our evaluation: it ignores the prompt.

    A sequential model answers from the items before a query, a general one from the user's training part.

    Args:
        config: recbole Config.
        dataset: what `read_dataset` gave for `dataset_class(config)`; it is built (RecBole's word for split) here.
        sequences: Sequences of that dataset.
        folder: where the checkpoint goes, in RecBole's own form.

    Attributes:
        training: how the training ended: {"epochs": trained, "cap": the most that it might, "stopped_early": whether
            RecBole's early stopping ended it}; None before, and for models that learn without epochs.
    """

    def __init__(self, config, dataset, sequences, folder):
        self.config, self.sequences = config, sequences
        self.sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self.user_ids = dataset.token2id(dataset.uid_field, sequences.user_tokens)  # [U] RecBole's ids
        ranks_all = config.model_class.full_sort_predict is not AbstractRecommender.full_sort_predict
        self.at_once = config["eval_batch_size"] if ranks_all else max(1, _PAIRS // sequences.n_items)
        self.train_data, self.valid_data, self.test_set = self._split(dataset)  # before the model, which reads keys they set
        init_seed(config["seed"], config["reproducibility"])
        self.model = config.model_class(config, self.train_data._dataset).to(config["device"])
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])
        config["checkpoint_dir"] = str(folder)
        with tensorboard_in(folder / "tensorboard"):
            self.trainer = type(trainer.__name__, (_Noting, trainer), {})(config, self.model)
        self.file = folder / f"{config['model']}.pth"
        self.trainer.saved_model_file = str(self.file)
        self.trainer.item_tensor = self.test_set.get_item_feature().to(config["device"])
        self.trainer.tot_item_num = sequences.n_items
        self.training = None

    def _split(self, dataset):
        """RecBole's loaders of training and validation, as its `data_preparation` makes them, and the test dataset."""
        config = self.config
        parts = dataset.build()
        samplers = create_samplers(config, dataset, parts)
        graph = ()
        if config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
            negatives = config["train_neg_sample_args"]
            graph = (KGSampler(dataset, negatives["distribution"], negatives["alpha"]),)
        train_data = get_dataloader(config, "train")(config, parts[0], samplers[0], *graph, shuffle=config["shuffle"])
        queries = config["eval_batch_size"]
        # the loader counts rows for sequential models, (user, item) pairs for others
        config["eval_batch_size"] = self.at_once if self.sequential else self.at_once * self.sequences.n_items
        valid_data = get_dataloader(config, "valid")(config, parts[1], samplers[1], shuffle=False)
        config["eval_batch_size"] = queries
        return train_data, valid_data, parts[2]

    def train(self, show_progress=False, on_epoch=None):
        """Train to RecBole's early stopping, going on from the checkpoint if there is one; leaves the best weights.

        Args:
            on_epoch: called with RecBole's trainer after each validated epoch, whose checkpoint is on disk if it is the best.

        Returns:
            list of one dict per validated epoch: epoch, loss (as RecBole counts it: a sum over batches), metrics.
        """
        trainer = self.trainer
        started = self.file.exists()
        if started:
            self._resume()
        if not started or trainer.start_epoch < trainer.epochs:
            callback = on_epoch and (lambda epoch, score: on_epoch(trainer))
            trainer.fit(self.train_data, self.valid_data, verbose=False, show_progress=show_progress, callback_fn=callback)
        if self.config["MODEL_TYPE"] != ModelType.TRADITIONAL:
            trained = max(trainer.train_loss_dict, default=trainer.start_epoch - 1) + 1
            self.training = {"epochs": trained, "cap": trainer.epochs, "stopped_early": trainer.cur_step > trainer.stopping_step}
        trainer.resume_checkpoint(self.file)
        self.model.eval()
        return trainer.history

    def _resume(self):
        try:
            self.trainer.resume_checkpoint(self.file)
        except Exception as error:  # a damaged zip or pickle raises anything
            raise UserError(
                f"checkpoint {self.file} is damaged or of other settings ({type(error).__name__}); delete it to train anew"
            ) from error

    @torch.no_grad()
    def score(self, prompted, rows):
        """As the methods in evaluation.methods: float [B, V]."""
        position = prompted.queries.position[rows]
        return torch.cat([self._scores(position[i : i + self.at_once]) for i in range(0, len(position), self.at_once)])

    def depends_on(self, prompted):
        return prompted.queries.position[:, None]

    def _scores(self, position):
        config, sequences = self.config, self.sequences
        fields = {config["USER_ID_FIELD"]: self.user_ids[sequences.user_of[position]]}
        if self.sequential:
            length = config["MAX_ITEM_LIST_LENGTH"]
            item_seq, lengths = sequences.histories(position, length)
            item_seq = np.pad(item_seq, ((0, 0), (0, length - item_seq.shape[1])))  # [B, L]: some models insist on L
            fields[config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"]] = item_seq
            fields[config["ITEM_LIST_LENGTH_FIELD"]] = lengths
        interaction = self.test_set.join(Interaction({field: torch.from_numpy(v) for field, v in fields.items()}))
        interaction = self.valid_data.transform(self.test_set, interaction)
        # RecBole's Trainer knows which models rank all items and which are asked pair by pair
        return self.trainer._full_sort_batch_eval((interaction, None, None, None))[1]


class _Noting:
    """Mixin for RecBole's trainers: keeps a history, and writes checkpoints whole or not at all."""

    def __init__(self, config, model):
        super().__init__(config, model)
        self.history = []

    def _valid_epoch(self, valid_data, show_progress=False):
        score, result = super()._valid_epoch(valid_data, show_progress)
        epoch = max(self.train_loss_dict)
        loss, metric = self.train_loss_dict[epoch], self.config["valid_metric"]
        self.history.append({"stage": 1, "epoch": epoch, "loss": loss, "score": score, f"RecBole's validation {metric}": score})
        if show_progress:
            tqdm.write(f"{self.config['model']} epoch {epoch + 1}  loss {loss:.4f}  {metric} {score:.4f}")
        return score, result

    def _save_checkpoint(self, epoch, verbose=True, **kwargs):
        with checkpoints.replacing(self.saved_model_file) as temporary:
            super()._save_checkpoint(epoch, verbose, saved_model_file=str(temporary))


class _LinkedSplit(ChronologicalSplit):
    """The split for datasets with a knowledge graph: the links of items that it removes go too."""

    def _data_filtering(self):
        super()._data_filtering()
        self._filter_link()


def dataset_class(config):
    """RecBole's dataset class for the model, with the chronological split mixed in."""
    kind = config["MODEL_TYPE"]
    special = getattr(recbole.data.dataset, f"{config['model']}Dataset", None)
    if special is None and kind == ModelType.KNOWLEDGE:
        special = KnowledgeBasedDataset
    if special is None:
        return PrefixDataset if kind == ModelType.SEQUENTIAL else FlatDataset
    split = _LinkedSplit if issubclass(special, KnowledgeBasedDataset) else ChronologicalSplit
    return type(special.__name__, (split, special), {})


def check_recipe(config):
    """Refuse the models that RecBole does not train in one go, or that do not rank items."""
    name, stage = config["model"], config["train_stage"]
    if config["MODEL_TYPE"] == ModelType.DECISIONTREE:
        raise UserError(f"model '{name}': RecBole's decision trees predict labels and rank no items; choose another model")
    if name == "DIEN":
        raise UserError("model 'DIEN': RecBole's scores candidates from sampled negative histories, which a query has not; try DIN")
    if stage and stage != "finetune":
        raise UserError(
            f"model '{name}': RecBole trains it in stages, and train_stage={stage} ends in no recommender; pretrain it with "
            "RecBole, then give --train_stage=finetune --pre_model_path=FILE"
        )


@contextmanager
def _in_one_line(config):
    """Whatever RecBole raises when a model cannot work with the data at hand, as a UserError."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(
            f"model '{config['model']}' does not work on dataset '{config['dataset']}': {type(error).__name__}: {error}; "
            "it may need other fields (load_col) or settings, see RecBole's documentation of it"
        ) from error


@contextmanager
def _timed(seconds, name):
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
