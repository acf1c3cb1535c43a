"""That the model learns, not only runs: the default preset on the simulator, against the train mean, with features
shuffled, and as published."""
import learning
import numpy as np
import pytest
import torch

from biojepa.actions.featurizers import featurize
from biojepa.actions.vocabulary import Modality
from biojepa.config import preset
from biojepa.data.loaders import cell_loader
from biojepa.model.biojepa import BioJEPA
from biojepa.predict.baselines import train_mean, with_own_gene
from biojepa.predict.model import Subject, predictions
from biojepa.predict.regressors import nearest_neighbours, ridge, target_features
from biojepa.predict.sets import pseudobulk, test_set
from biojepa.training.monitor import effective_rank, encoder_latents


def test_interval_of_a_known_mean():
    difference, low, high = learning.paired_interval(np.random.default_rng(0).normal(.5, 1, 400))
    assert low < difference < high and abs((high - low) - 2*1.96/20) < .02


def test_a_perfect_prediction_beats_the_mean(monkeypatch):
    screen = learning.Screen()
    observed = learning.pseudobulk_delta(screen.adata)
    monkeypatch.setattr(
        learning, "predicted_delta",
        lambda model, screen, part: observed.loc[sorted({screen.table.condition[p] for p in screen.test})])
    result = learning.score(None, screen)
    assert result["n"] == 15 and result["model"] > .999 and result["low"] > 0


def test_shuffling_moves_every_target_and_keeps_guides_together():
    screen, other = learning.Screen(), learning.Screen(shuffle=0)
    same = (screen.actions.features
            == other.actions.features).flatten(1).all(1).numpy() & screen.actions.present.any(1).numpy()
    assert same.sum() < 8
    for target in list(dict.fromkeys(screen.table.targets))[1:10]:
        rows = [i for i, t in enumerate(screen.table.targets) if t == target]
        assert (other.actions.features[rows, 0] == other.actions.features[rows[0], 0]).all()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "The default preset, all four stages."
    screen = learning.Screen()
    return screen, *learning.run(screen, preset("laptop"), tmp_path_factory.mktemp("default"))


@pytest.mark.slow
def test_pretraining_loss_falls(trained):
    log = trained[2]["pretrain"].dropna(subset=["val_total"])
    assert log.val_total.iloc[-1] < .7*log.val_total.iloc[0]


@pytest.mark.slow
def test_latents_use_more_than_half_of_their_dimensions(trained):
    """Over all tokens; across cells at one gene, whose value is a single number, fewer are used, and must not
    become fewer still."""
    screen, model, logs, _ = trained
    cells = next(iter(cell_loader(screen.adata, screen.split, "val", batch_size=256, seed=0, training=True)))
    torch.manual_seed(0)
    start, genes = BioJEPA(model.config), torch.arange(0, screen.adata.n_vars, 40)
    for part in ("encoder", "teacher"):
        before, after = (encoder_latents(m, cells, genes)[part] for m in (start, model))
        assert effective_rank(after.flatten(0, 1)).item() > .5*model.config.d_model
        assert effective_rank(after).mean() > .9*effective_rank(before).mean()


@pytest.mark.slow
def test_held_out_guides_find_their_protein(trained):
    screen, model = trained[:2]
    report = learning.retrieval_report(model, screen.anchor, screen.positive, screen.table.target_codes,
                                       screen.test, screen.test)
    assert report["top10"] > report["chance_top10"] + .15


@pytest.mark.slow
def test_held_out_targets_are_predicted_better_than_by_the_train_mean(trained):
    result = learning.score(trained[1], trained[0])
    assert result["n"] == 15 and result["low"] > 0, result


@pytest.mark.slow
def test_better_than_baselines_on_features_and_than_a_mean_that_knows_the_target(trained):
    screen, model = trained[:2]
    banks = [
        featurize("kmer", x, modality=m, progress=False, cache=False)
        for x, m in ((screen.adata.uns["protein_sequences"], Modality.PROTEIN), ({
            g: s for g, s, t in zip(screen.table.guide_id, screen.table.guide_seqs, screen.table.targets)
            if t
        }, Modality.DNA))
    ]
    given = (test_set(screen.adata, screen.split), screen.adata, screen.split)
    features = target_features(banks, screen.table)
    others = [
        with_own_gene(train_mean(*given), *given[1:]),
        nearest_neighbours(*given, features),
        ridge(*given, features)
    ]
    def r(s):
        bulk = pseudobulk(s)
        return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(bulk.predicted, bulk.observed)])
    asked = Subject(model, screen.adata, screen.split, screen.actions, screen.table)
    own = r(predictions(asked, progress=False))
    for other in others:
        difference, low, high = learning.paired_interval(own - r(other))
        assert low > 0, (other.name, difference, low, high)


@pytest.mark.slow
def test_not_with_shuffled_features(tmp_path):
    screen = learning.Screen(shuffle=0)
    model, *_ = learning.run(screen, preset("laptop"), tmp_path)
    result = learning.score(model, screen)
    assert result["low"] < 0, result
