"""figures/peers.csv: what the peers of some runs scored and cost. This one runs in the project's own environment.

    .venv/bin/python peers/table.py default=runs/5e3e9e35fdcd-0 pairs=runs/…

A run needs config.json, split.json and answers in its folder `peers`; the model's row comes from the run's
predictions.h5ad, which nbs/90_eval.ipynb saves, and is left out where there is none. Sets of the table that are not
named keep their rows.
"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from biojepa.config import named_experiment
from biojepa.core import PATHS
from biojepa.data.splits import Split
from biojepa.evaluate.compare import score_all
from biojepa.evaluate.summary import summarise
from biojepa.predict.methods import baseline_plan, run_baselines
from biojepa.predict.outside import outside_answers, task_of
from biojepa.predict.sets import PredictionSet, test_set
from biojepa.report.manifest import Report
from biojepa.training.run import load_data

METRICS = ["r_delta", "r_delta_perturbed_mean", "pds", "de_overlap_50"]
MISSING = {     # what cannot run, and why
    "scgpt": "no row: its weights are not on any package index, and without them it is another model",
}


def methods_of(run):
    "The model, the train mean, the sum of singles where there are pairs, and the peers; the cells and the split."
    experiment = named_experiment(run=run)
    adata, split = load_data(experiment.data, Split.load(run/"split.json"))
    template = test_set(adata, split)
    simple = ["train_mean", *({"additive"} & set(baseline_plan(template, adata, split, {}, None)))]
    sets = list(run_baselines(template, adata, split, only=simple, progress=False).values())
    if (saved := run/"predictions.h5ad").is_file():
        model = PredictionSet.load(saved)
        if task_of(model) != task_of(template): raise ValueError(f"{saved}: answers another task; save it again")
        sets.insert(0, model)
    return [*sets, *outside_answers(run/"peers", template)], SimpleNamespace(adata=adata, split=split)


def rows_of(name, run):
    "Every metric of every method, with intervals, differences and costs."
    sets, cells = methods_of(Path(run))
    scores = score_all(sets, cells, METRICS, progress=False)
    table = summarise(scores)
    table["beyond_train_mean"] = table["difference"].where(table["against"] == "train_mean")
    for end in ("low", "high"):
        table[f"beyond_{end}"] = table[f"difference_{end}"].where(table["against"] == "train_mean")
    if "biojepa" in set(table["method"]):
        other = summarise(scores, reference="biojepa").set_index(["metric", "method"])
        at = pd.MultiIndex.from_frame(table[["metric", "method"]])
        names = {"difference": "beyond_biojepa", "difference_low": "beyond_biojepa_low",
                 "difference_high": "beyond_biojepa_high"}
        table[list(names.values())] = other.loc[at, list(names)].to_numpy()
    about = {s.name: s.provenance for s in sets if "peer_settings" in s.provenance}
    def said(key): return [about.get(m, {}).get(key) for m in table["method"]]
    def settings(of): return json.dumps({k: v for k, v in of.items() if k not in ("losses", "threads", "features")})
    table = table.assign(set=name, seconds=said("seconds"), peak_gb=said("peak_gb"), package=said("peer"),
                         settings=[settings(of) if of else "" for of in said("peer_settings")])
    return table.rename(columns={"method": "peer", "mean": "value"})


def main():
    runs = dict(argument.split("=", 1) for argument in sys.argv[1:])
    found = pd.concat([rows_of(*run) for run in runs.items()], ignore_index=True)
    kept = ["set", "peer", "metric", "value", "low", "high", "n",
            *(c for c in found if c.startswith("beyond_")), "seconds", "peak_gb", "package", "settings"]
    missing = pd.DataFrame([dict(peer=peer, settings=why) for peer, why in MISSING.items()])
    table = PATHS.figures/"peers.csv"
    before = pd.read_csv(table).dropna(subset="set") if table.is_file() else pd.DataFrame(columns=kept)
    rows = pd.concat([before[~before["set"].isin(list(runs))], found[kept], missing], ignore_index=True)
    Report("peers", made_from=dict(sets=list(rows["set"].dropna().unique()))).table(rows, "peers")


if __name__ == "__main__": main()
