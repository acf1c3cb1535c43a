"Train the stages on the simulator and score Δ per held-out target; for test_learning.py, also by hand: python tests/learning.py out.csv [switch=value …]"
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from biojepa.actions.action_tokens import action_batch
from biojepa.actions.featurizers import featurize
from biojepa.actions.vocabulary import ActionTable, Modality, Mode
from biojepa.config import ExperimentConfig, preset
from biojepa.data.batches import CellBatch, dense_rows
from biojepa.data.datasets import load_dataset
from biojepa.data.preprocess import prepare
from biojepa.data.splits import make_split
from biojepa.model.biojepa import BioJEPA
from biojepa.training.align import align, retrieval_report
from biojepa.training.dynamics import train_dynamics
from biojepa.training.pretrain import pretrain
from biojepa.training.readout import fit_readout


class Screen:
    "The simulator's default screen, its split and its k-mer features; `shuffle` deals the targets' features anew."
    def __init__(self, banks=("protein", "dna"), shuffle=None):
        self.adata = prepare(load_dataset("simulated"))
        self.split, self.table = make_split(self.adata, seed=1), ActionTable.from_anndata(self.adata)
        guides = {g: s for g, s, t in zip(self.table.guide_id, self.table.guide_seqs, self.table.targets) if t}
        bank = dict(protein=featurize("kmer",
                                      self.adata.uns["protein_sequences"],
                                      modality=Modality.PROTEIN,
                                      progress=False,
                                      cache=False),
                    dna=featurize("kmer", guides, modality=Modality.DNA, progress=False, cache=False))
        self.anchor, self.positive = action_batch(self.table, bank["protein"],
                                                  mode=Mode.CONTROL), action_batch(self.table, bank["dna"])
        self.actions = action_batch(self.table, [bank[b] for b in banks], genes=self.adata.var_names)
        if shuffle is not None: self._shuffle(shuffle)
        self.train, self.test = (self.table.rows(self.adata, self.split, part) for part in ("train", "test"))

    def _shuffle(self, seed):
        rows = {}
        for i, t in enumerate(self.table.targets):
            if t: rows.setdefault(t, []).append(i)
        targets, source = list(rows), np.arange(len(self.table))
        for a, b in zip(targets, np.random.default_rng(seed).permutation(len(targets))):
            source[rows[a]] = np.resize(rows[targets[b]], len(rows[a]))
        self.actions, self.anchor = (x.take(torch.from_numpy(source)) for x in (self.actions, self.anchor))


def pseudobulk_delta(adata)->pd.DataFrame:
    "Condition × gene: mean over cells of expression minus the mean control of the cell's gem group."
    x, ctrl = adata.X.toarray(), (adata.obs.condition == "ctrl").to_numpy()
    batch = adata.obs.batch.astype(str).to_numpy()
    mean = {b: x[ctrl & (batch == b)].mean(0) for b in np.unique(batch)}
    return pd.DataFrame(x - np.stack([mean[b] for b in batch]))[~ctrl].groupby(
        adata.obs.condition.astype(str).to_numpy()[~ctrl]).mean()


@torch.no_grad()
def predicted_delta(model, screen, part, n_controls=64)->pd.DataFrame:
    "Condition × gene: mean predicted Δ over the same control cells for every guide of a condition."
    adata, rows = screen.adata, screen.split.controls(screen.adata, "train")
    rows = np.random.default_rng(0).permutation(rows)[:n_controls]
    x, size = dense_rows(adata.X, rows), torch.from_numpy(adata.obs.log_library_size.to_numpy(np.float32)[rows])
    z, control = model.encoder(x, size), model.control_latents(x, size)
    deltas = {}
    for p in screen.table.rows(adata, screen.split, part):
        z_hat = model.act(z, x, size, screen.actions.take(torch.full((len(rows),), int(p)))).mean
        delta = model.readout.delta(z_hat, control.x, None, control.index)
        deltas.setdefault(screen.table.condition[p], []).append(delta.mean(0).numpy())
    return pd.DataFrame({c: np.mean(d, 0) for c, d in deltas.items()}).T


def paired_interval(difference, n=5000, seed=0)->tuple[float, float, float]:
    "Mean and 95 % bootstrap interval over targets."
    d = np.asarray(difference)
    means = d[np.random.default_rng(seed).integers(len(d), size=(n, len(d)))].mean(1)
    return float(d.mean()), *map(float, np.quantile(means, [.025, .975]))


def score(model, screen, part="test")->dict[str, float]:
    "Pearson of Δ over all genes, per target, against the train mean's."
    observed, predicted = pseudobulk_delta(screen.adata), predicted_delta(model, screen, part)
    mean = observed.loc[sorted({screen.table.condition[p] for p in screen.train})].mean(0)
    r = lambda a, b: np.corrcoef(a, b)[0, 1]
    table = pd.DataFrame({
        c:
        dict(model=r(predicted.loc[c], observed.loc[c]),
             train_mean=r(mean, observed.loc[c]),
             specific=r(predicted.loc[c] - predicted.mean(0), observed.loc[c] - mean))
        for c in predicted.index
    }).T
    difference, low, high = paired_interval(table.model - table.train_mean)
    return dict(n=len(table),
                model=table.model.mean(),
                train_mean=table.train_mean.mean(),
                difference=difference,
                low=low,
                high=high,
                specific=table.specific.mean())


def run(screen, experiment:ExperimentConfig, folder:Path, seed=0, **options):  # model, logs, seconds
    "All four stages."
    torch.manual_seed(seed)
    model, logs, seconds = BioJEPA(experiment.model), {}, {}
    e, a = experiment, screen.adata
    stages = dict(pretrain=lambda: pretrain(
        model, a, screen.split, e.pretrain, folder/"pretrain", seed, progress=False, **options),
                  align=lambda: align(model,
                                      screen.anchor,
                                      screen.positive,
                                      screen.table.target_codes,
                                      screen.train,
                                      e.align,
                                      folder/"align",
                                      seed,
                                      progress=False),
                  dynamics=lambda: train_dynamics(model,
                                                  a,
                                                  screen.split,
                                                  screen.actions,
                                                  e.dynamics,
                                                  folder/"dynamics",
                                                  seed,
                                                  progress=False,
                                                  **options),
                  readout=lambda: fit_readout(model,
                                              a,
                                              screen.split,
                                              screen.actions,
                                              e.readout,
                                              folder/"readout",
                                              seed,
                                              progress=False,
                                              **options))
    for name, stage in stages.items():
        start = time.perf_counter()
        logs[name] = stage()
        seconds[name] = time.perf_counter() - start
    return model, logs, seconds
