"""Many models and ablations on one evaluation set, in one table: the story of `recbole-dpr benchmark`."""

from pathlib import Path

from recbole_dpr.benchmark import report
from recbole_dpr.benchmark.parts import check_folders, check_settings, merged, plan
from recbole_dpr.errors import UserError
from recbole_dpr.yamlfile import read_yaml


def run_benchmark(models, dataset="ml-100k", ablations=(), seeds=(), config_files=(), config_dict=None, command=None, ablated=()):
    """Run every model and ablation for every seed, and write their table, its CSV and a figure after each.

    Every part is an ordinary run in a folder of its own. A second call in the same folder takes what has ended as it is,
    goes on with what was interrupted, and tries again what could not be run.

    Args:
        models: names as for `run_dpr`, DPR over another backbone as DPR_<backbone>; a list, or joined by commas.
        dataset: dataset name.
        ablations: names of properties/ablations.yaml, "all", or nothing; each for every DPR model, or for those of
            `ablated`.
        seeds: whole numbers; default the key `seed`.
        config_files, config_dict: settings as for `run_dpr`; each model gets those that it knows, and what `per_model`
            (model -> settings) has for it alone. `output_dir` is the folder of the benchmark, default
            <checkpoint_dir>/benchmark-<dataset>.
        command: the command line, for the head of the table.

    Returns:
        The folder, a Path, with table.md, table.csv, figure.png and the folders of the runs.

    Raises:
        UserError: an input that can be put right, in one line. A part that fails alone is noted in the table.
    """
    settings = merged(*(read_yaml(Path(file)) for file in config_files), config_dict or {})
    output_dir = settings.pop("output_dir", None)
    parts = plan(models, ablations, seeds, settings, ablated)
    config = check_settings([part for part in parts if not part.ablation and part.seed == parts[0].seed], dataset, settings)
    folder = Path(output_dir or Path(config["checkpoint_dir"]) / f"benchmark-{dataset}")
    check_folders(parts, dataset, folder)
    failed, show = {}, bool(config["show_progress"])

    def write():
        report.write(folder, dataset, parts, failed, config["valid_metric"], command)

    for number, part in enumerate(parts, 1):
        if show:
            print(f"\npart {number} of {len(parts)}: {part.name}" + (", finished before" if part.finished(folder) else ""), flush=True)
        try:
            if part.run(dataset, folder):
                write()
        except UserError as error:
            failed[part] = str(error)
            if show:
                print(f"not run: {error}", flush=True)
    if len(failed) == len(parts):
        raise UserError(next(iter(failed.values())))
    write()
    return folder
