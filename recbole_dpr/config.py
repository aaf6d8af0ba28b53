"""A RecBole Config for promptable models: where the property files lie, what the keys may hold."""

import difflib
from importlib.util import find_spec
from pathlib import Path

from recbole.config import Config
from recbole.utils import ModelType, argument_list

from recbole_dpr.errors import UserError, unknown
from recbole_dpr.model import MODELS, is_promptable, promptable
from recbole_dpr.model.backbones import check_backbone, sequential_models
from recbole_dpr.prompts.intent import ROUTERS
from recbole_dpr.resources import properties_dir
from recbole_dpr.yamlfile import read_yaml

_CHOICES = {
    "eval_positions": ("first", "all"),
    "eval_neg_target": ("window", "nearest"),
    "eval_tag_form": ("template", "bare"),
    "pos_target": ("window", "compliance"),
    "neg_target": ("compliance", "window"),
    "prompt_keys": ("sentence", "token"),
    "encoder_precision": ("auto", "float32", "bfloat16"),
    "softmax_precision": ("auto", "float32", "bfloat16"),
    "backbone_precision": ("auto", "float32", "bfloat16"),
    "intent_router": tuple(ROUTERS),
}
_BOOLEANS = (
    *("short_windows", "mask_history", "drop_unseen_items", "two_towers", "item_text", "read_prompts", "decouple_backbone"),
    *("baselines", "show_progress"),
)
_POSITIVE_INTEGERS = (
    *("compliance_n", "fusion_heads", "fusion_inner_size", "train_batch_size", "eval_batch_size", "valid_window"),
    *("MAX_ITEM_LIST_LENGTH", "hidden_size", "embedding_size", "eval_step", "prefixes_per_sequence", "prefix_batch_size"),
)
_POSITIVE_NUMBERS = ("temperature",)
_UNIT_NUMBERS = ("prompt_share", "fusion_dropout", "hidden_dropout_prob", "attn_dropout_prob", "dropout_prob", "mask_ratio", "ft_ratio")
STAGES = ("stage1", "stage2", "stage3", "base_f", "base_f_a")
_STAGE_KEYS = {
    *("epochs", "learning_rate", "backbone_learning_rate", "stopping_step", "valid_tasks", "prompts", "prompt_noise", "schedule", "train_batch_size"),
}
_VALID_TASKS = ("SEQ", "POS/category", "POS/wish", "POS/tag", "NEG/category", "NEG/tag")
_SCHEDULES = ("cosine", "constant")
_PROMPT_KINDS = ("category", "tag", "wish")
_TRAINING = properties_dir() / "training.yaml"  # for models of ours only
# keys of RecBole that stand in none of its lists or property files
_RECBOLE_EXTRAS = {
    *("model", "dataset", "config_files", "encoding", "nproc", "world_size", "ip", "port", "group_offset"),
    *("local_rank", "offset", "wandb_project", "fields_in_same_space", "embedding_size"),
}


class PromptConfig(Config):
    """RecBole's Config without its `eval` of strings and without its own reading of `sys.argv`."""

    def _load_cmd_line(self):
        return {}

    def _convert_config_dict(self, config_dict):
        return dict(config_dict)

    def _get_final_config_dict(self):
        """RecBole's defaults, but for what its users have to say to train some of its models on next items."""
        settings, given = super()._get_final_config_dict(), self.external_config_dict
        if settings["MODEL_TYPE"] == ModelType.SEQUENTIAL and settings.get("loss_type") == "CE":
            settings["train_neg_sample_args"] = given.get("train_neg_sample_args")  # cross-entropy takes no negatives
        if settings["MODEL_TYPE"] == ModelType.CONTEXT and "threshold" not in given:  # no labels: interactions are positive
            settings.update(threshold=None, train_neg_sample_args=given.get("train_neg_sample_args", {"distribution": "uniform"}))
        return settings


def make_config(model, dataset, config_files=(), overrides=None):
    """The settings of one run.

    Args:
        model: a name of `MODELS`, DPR with the key `backbone`, or any model of RecBole.
        dataset: dataset name; its folder lies below the key `data_path`.
        config_files: YAML files, later ones win.
        overrides: dict of keys, which win over all files.

    Returns:
        recbole Config.

    Raises:
        UserError: an unknown model, file, key or a value out of range.
    """
    overrides = dict(overrides or {})
    model = model_name(model, config_files, overrides)
    model_class = find_model(model)
    files = [properties_dir() / "dpr.yaml"]
    if is_promptable(model):
        files += [_TRAINING, model_class.backbone_properties(), _model_file(model)]
    dataset_file = properties_dir() / "dataset" / f"{dataset}.yaml"
    files += [dataset_file] if dataset_file.is_file() else []
    user_settings = {}
    for file in config_files:
        user_settings.update(read_yaml(Path(file)))
        files.append(Path(file))
    user_settings.update(overrides)
    check_keys(user_settings, model)
    try:
        config = PromptConfig(
            model=model_class,
            dataset=dataset,
            config_file_list=[str(f) for f in files],
            config_dict=_merged_stages(files, overrides) if is_promptable(model) else overrides,
        )
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError) as error:
        raise UserError(f"settings that RecBole refuses: {' '.join(str(error).split())}") from error
    if dataset == "ml-100k" and "data_path" in user_settings:  # RecBole insists on the copy in its wheel
        config["data_path"] = str(Path(user_settings["data_path"]) / dataset)
    check_values(config)
    if is_promptable(model):
        check_backbone(model_class.backbone_class, config)
    return config


def model_name(model, config_files=(), overrides=None):
    """The full name of a model: DPR with the key `backbone` is DPR_<backbone>.

    Raises:
        UserError: DPR without a backbone, or with one that RecBole does not know; a backbone of another model.
    """
    backbone = None
    for settings in [*(read_yaml(Path(file)) for file in config_files), overrides or {}]:
        backbone = settings.get("backbone", backbone)
    if model == "DPR":
        if backbone is None:
            raise UserError("model 'DPR' needs a backbone, a sequential recommender of RecBole: --backbone=NARM")
        if backbone not in sequential_models():
            raise unknown("backbone", backbone, sequential_models())
        return f"DPR_{backbone}"
    if backbone is not None and model != f"DPR_{backbone}":
        raise UserError(f"backbone={backbone}: model '{model}' takes none; give --model=DPR --backbone={backbone}")
    return model


def find_model(name):
    """The class of a model of ours or of RecBole, by its name."""
    from recbole.utils import get_model

    if is_promptable(name):
        return promptable(name)
    try:
        return get_model(name)
    except (ValueError, AttributeError):
        raise unknown("model", name, [*MODELS, "DPR", *recbole_models()]) from None
    except ImportError as error:
        raise UserError(f"model '{name}' needs a package that is not installed: {error}") from error


def recbole_models():
    """Names of RecBole's models, read from its property files."""
    folder = Path(find_spec("recbole").origin).parent / "properties" / "model"
    return sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.islower())  # lightgbm and xgboost rank no items


def check_values(config):
    """Hold every key of ours against what it may be; one line for the first that is wrong."""
    for key, valid in _CHOICES.items():
        if key in config and config[key] not in valid:
            raise unknown(f"{key}=", config[key], valid)
    for key in _BOOLEANS:
        if key in config and not isinstance(config[key], bool):
            raise UserError(f"{key}={config[key]!r}: valid are True and False")
    for key in _POSITIVE_INTEGERS:
        if config[key] is not None and not (_is_int(config[key]) and config[key] > 0):
            raise UserError(f"{key}={config[key]!r}: a whole number from 1 is needed")
    for key in _POSITIVE_NUMBERS:
        if key in config and not (_is_number(config[key]) and config[key] > 0):
            raise UserError(f"{key}={config[key]!r}: a number above 0 is needed")
    for key in _UNIT_NUMBERS:
        if config[key] is not None and not (_is_number(config[key]) and 0 <= config[key] <= 1):
            raise UserError(f"{key}={config[key]!r}: a number from 0 to 1 is needed")
    if not (config["data_cache_dir"] in (None, False) or isinstance(config["data_cache_dir"], str)):
        raise UserError(f"data_cache_dir={config['data_cache_dir']!r}: a folder is needed, or False")
    if not _is_int(config["seed"]) or config["seed"] < 0:
        raise UserError(f"seed={config['seed']!r}: a whole number from 0 is needed")
    for key in ("windows", "train_windows"):
        if key in config and not (isinstance(config[key], list) and config[key] and all(_is_int(n) and n > 0 for n in config[key])):
            raise UserError(f"{key}={config[key]!r}: a list of whole numbers from 1 is needed, such as [3,5,10]")
    if not (_is_int(config["epochs"]) and config["epochs"] >= 0):
        raise UserError(f"epochs={config['epochs']!r}: a whole number from 0 is needed (it caps every stage)")
    _check_split(config["eval_args"])
    if is_promptable(config["model"]):
        _check_training(config)


def _check_training(config):
    """The keys of properties/training.yaml that concern each other, and the stages."""
    # the item embeddings of RecBole's models that have both keys, and so their states, are of embedding_size
    size = "embedding_size" if "embedding_size" in read_yaml(config.model_class.backbone_properties()) else "hidden_size"
    if config[size] % config["fusion_heads"]:
        raise UserError(f"fusion_heads={config['fusion_heads']}: has to divide {size}={config[size]}")
    if config["loss_type"] != "CE":
        raise UserError(f"loss_type={config['loss_type']!r}: DPR models train on cross-entropy: CE")
    if config["stages"] not in ([1], [1, 2], [1, 3], [1, 2, 3]):
        raise UserError(f"stages={config['stages']!r}: valid are [1], [1,2], [1,3] and [1,2,3]")
    weights = config["loss_weights"]
    if not (isinstance(weights, dict) and set(weights) == {"seq", "pos", "neg"} and _all_at_least_0(weights)):
        raise UserError(f"loss_weights={weights!r}: three numbers from 0 are needed: {{seq: 1, pos: 1, neg: 1}}")
    scales = config["text_scale"]
    if not (isinstance(scales, list) and len(scales) == 2 and all(map(_is_number, scales))):
        raise UserError(f"text_scale={scales!r}: two numbers are needed, of the positive and the negative expert: [0.2, -0.02]")
    if not (_is_number(config["unprompted_weight"]) and config["unprompted_weight"] >= 0):
        raise UserError(f"unprompted_weight={config['unprompted_weight']!r}: a number from 0 is needed")
    for name in STAGES:
        _check_stage(name, config[name])


def _check_split(args):
    split = args.get("split") or {}
    ratios = split.get("RS")
    good_ratio = isinstance(ratios, list) and len(ratios) == 3 and all(_is_number(r) and r > 0 for r in ratios)
    if not (good_ratio or split.get("LS") == "valid_and_test") or args["order"] != "TO" or args["group_by"] != "user":
        raise UserError(
            f"eval_args={args!r}: valid are split {{RS: [0.8,0.1,0.1]}} or {{LS: valid_and_test}}, "
            "order TO, group_by user"
        )


def _check_stage(name, stage):
    if not isinstance(stage, dict):
        raise UserError(f"{name}={stage!r}: keys are needed, such as {{epochs: 5}}")
    for key in stage:
        if key not in _STAGE_KEYS:
            raise unknown(f"key of {name}", key, sorted(_STAGE_KEYS))
    for key in ("epochs", "stopping_step"):
        if not (_is_int(stage[key]) and stage[key] >= 0):
            raise UserError(f"{name}.{key}={stage[key]!r}: a whole number from 0 is needed")
    batch_size = stage.get("train_batch_size", 1)
    if not (_is_int(batch_size) and batch_size > 0):
        raise UserError(f"{name}.train_batch_size={batch_size!r}: a whole number from 1 is needed")
    for key in ("learning_rate", "backbone_learning_rate", "prompt_noise"):
        if key in stage and not (_is_number(stage[key]) and stage[key] >= 0):
            raise UserError(f"{name}.{key}={stage[key]!r}: a number from 0 is needed")
    if stage["schedule"] not in _SCHEDULES:
        raise unknown(f"{name}.schedule", stage["schedule"], _SCHEDULES)
    for task in stage["valid_tasks"]:
        if task not in _VALID_TASKS:
            raise unknown(f"{name}.valid_tasks", task, _VALID_TASKS)
    shares = stage.get("prompts", {"category": 1.0})
    if not isinstance(shares, dict) or not _all_at_least_0(shares) or not sum(shares.values()):
        raise UserError(f"{name}.prompts={shares!r}: shares from 0 are needed, such as {{category: 0.3, tag: 0.7}}")
    for kind in shares:
        if kind not in _PROMPT_KINDS:
            raise unknown(f"{name}.prompts", kind, _PROMPT_KINDS)


def _merged_stages(files, overrides):
    """`overrides` with its stage keys completed from the files, so that one key of a stage can be set alone."""
    stages = {name: {} for name in STAGES}
    for settings in [*map(read_yaml, files), overrides]:
        for name, stage in stages.items():
            given = settings.get(name, {})
            if not isinstance(given, dict):
                raise UserError(f"{name}={given!r}: keys are needed, such as {{epochs: 5}}")
            stage.update(given)
        for key, value in settings.items():  # --stage3.epochs=4
            name, dot, inner = key.partition(".")
            if dot and name in stages:
                stages[name][inner] = value
    return {**{k: v for k, v in overrides.items() if k.partition(".")[0] not in stages}, **stages}


def merged_settings(model, config_files, overrides):
    """What files and overrides say, as one dict: `make_config` gives the same for it as for them."""
    files = [Path(file) for file in config_files]
    if is_promptable(model):
        overrides = _merged_stages(files, overrides)
    merged = {key: value for file in files for key, value in read_yaml(file).items()}
    return {**{key: value for key, value in merged.items() if key.partition(".")[0] not in overrides}, **overrides}


def searchable_keys(model):
    """The keys in which the trials of a search may differ, keys of a stage as `stage3.learning_rate`.

    They are of the model and its training. What is read and embedded once for all trials, and what the trials are
    compared on, stays the same; and what a DPR model has for each stage, it does not read above them.
    """
    shared = set(argument_list.general_arguments + argument_list.evaluation_arguments + argument_list.dataset_arguments)
    shared |= set(read_yaml(properties_dir() / "dpr.yaml")) | _RECBOLE_EXTRAS - {"embedding_size"}
    shared |= {"backbone", "baselines", "eval_step", "stages", "stage1_checkpoint", *STAGES}
    if not is_promptable(model):
        return sorted(known_keys(model) - shared)
    stages = sorted(f"stage{number}.{key}" for number in (1, 2, 3) for key in _STAGE_KEYS - {"valid_tasks"})
    return sorted(known_keys(model) - shared - {"learning_rate", "stopping_step"}) + stages


def known_keys(model):
    """The keys that a run of this model reads: RecBole's, its model file's, and ours."""
    folder = Path(find_spec("recbole").origin).parent / "properties"
    backbone = model.removeprefix("DPR_")
    files = [
        folder / "overall.yaml",
        folder / "dataset" / "sample.yaml",
        folder / "model" / f"{backbone}.yaml",
        properties_dir() / "dpr.yaml",
    ]
    if is_promptable(model):
        files += [_TRAINING, _model_file(model)]
    known = set(_RECBOLE_EXTRAS).union(*(read_yaml(file) for file in files if file.is_file()))
    for name in dir(argument_list):
        if name.endswith("_arguments"):
            known |= set(getattr(argument_list, name))
    return known


def _model_file(model):
    """Our property file of a DPR model; all backbones without one of their own share DPR.yaml."""
    own = properties_dir() / "model" / f"{model}.yaml"
    return own if own.is_file() else own.with_name("DPR.yaml")


def settings_in_force(config):
    """Every setting of a run as plain values: what `config.yaml` holds and --config_files= takes back."""
    settings = {key: config[key] for key in sorted(known_keys(config["model"])) if key in config.final_config_dict}
    plain = {key: value for key, value in settings.items() if isinstance(value, (int, float, str, bool, list, dict, type(None)))}
    for key in ("output_dir", "resume", "local_rank"):  # this run's own
        plain.pop(key, None)
    if (plain.get("train_neg_sample_args") or {}).get("distribution") == "none":
        plain["train_neg_sample_args"] = None  # as RecBole wants it said
    if config["dataset"] == Path(plain["data_path"]).name:
        plain["data_path"] = str(Path(plain["data_path"]).parent)  # RecBole has put the dataset's name behind it
    if Path(plain["data_path"]).name == "dataset_example":  # inside RecBole's wheel, wherever that is the next time
        del plain["data_path"]
    return plain


def check_keys(settings, model):
    """Refuse keys that nothing reads, with the nearest that something does."""
    known = known_keys(model)
    for key in settings:
        name, dot, inner = key.partition(".")
        if name not in known and name in read_yaml(_TRAINING):
            raise UserError(f"key '{key}' is for DPR models ({', '.join(MODELS)}, DPR); '{model}' is trained by RecBole's own recipe")
        if dot and name in STAGES:
            if inner not in _STAGE_KEYS:
                raise unknown(f"key of {name}", inner, sorted(_STAGE_KEYS))
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see properties/dpr.yaml and RecBole's documentation"
            raise UserError(f"unknown key '{key}' for model '{model}'; {hint}")


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _all_at_least_0(mapping):
    return all(_is_number(v) and v >= 0 for v in mapping.values())
