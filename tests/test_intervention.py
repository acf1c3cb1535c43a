"What is done to the targeted gene itself: learned from training targets, applied before the teacher looks."
import numpy as np
import pytest
import torch
from training_cases import small_data, small_experiment

from biojepa.actions.action_tokens import action_batch
from biojepa.actions.featurizers import featurize
from biojepa.actions.vocabulary import ActionTable, Modality, Mode
from biojepa.data.batches import ActionBatch
from biojepa.data.controls import match_controls
from biojepa.data.own_gene import own_gene_effects, targeted_values
from biojepa.model.biojepa import BioJEPA
from biojepa.predict.baselines import train_mean, with_own_gene
from biojepa.predict.model import Subject, predictions
from biojepa.predict.sets import test_set
from biojepa.training.align import jittered
from biojepa.training.dynamics import learn_interventions_

G = 40


def small(**switches):
    torch.manual_seed(0)
    ours = dict(predicts="change", intervenes=True, readout="per_gene") | switches
    return BioJEPA(small_experiment().model.changed(**ours))


@pytest.fixture(scope="module")
def screen():
    data = small_data()
    table = ActionTable.from_anndata(data["adata"])
    return data["adata"], data["split"], table, action_batch(table,
                                                             data["features"],
                                                             genes=data["adata"].var_names)


def cells(n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, G, generator=g)*(torch.rand(n, G, generator=g) < .5), 7 + torch.rand(n, generator=g)


def acts(genes, mode=0):
    genes = torch.tensor(genes)
    n = len(genes)
    features = torch.randn(n, 2, 24)
    features[:, 1, 20:] = 0
    return ActionBatch(features,
                       torch.tensor([0, 2]).expand(n, 2), torch.full((n, 2), mode),
                       torch.ones(n, 2).bool(), genes)


def test_places_are_those_of_the_targets(screen):
    adata, _, table, actions = screen
    names = list(adata.var_names)
    for row, targets in zip(actions.genes.tolist(), table.targets):
        assert [names[g] for g in row if g >= 0] == [t for t in targets if t in names]
    assert action_batch(
        table,
        featurize("kmer",
                  adata.uns["protein_sequences"],
                  modality=Modality.PROTEIN,
                  cache=False,
                  progress=False)).genes is None


def test_only_the_targeted_genes_change_and_as_their_mode_says():
    model, (x, _) = small(), cells()
    model.intervention[0], model.intervention[1] = torch.tensor([.5, 0.]), torch.tensor([1., 2.])
    expected = x.clone()
    expected[0, 3], expected[0, 7], expected[1, 5] = x[0, 3]*.5, x[0, 7]*.5, x[1, 5]*.5
    torch.testing.assert_close(model.intervened(x, acts([[3, 7], [5, -1], [-1, -1]])), expected)
    raised = x.clone()
    raised[:, 3] += 2
    torch.testing.assert_close(model.intervened(x, acts([[3], [3], [3]], mode=1)), raised)


def test_the_change_starts_from_the_cell_after_the_intervention():
    model, (x, size), actions = small(), cells(), acts([[3, 7], [5, -1], [-1, -1]])
    same = model.predict_latent(x, size, actions).mean
    torch.testing.assert_close(same, model.teacher(x, size).genes())      # nothing learned: nothing changes
    model.intervention[0] = torch.tensor([.25, 0.])
    done = x.clone()
    done[0, [3, 7]] *= .25; done[1, 5] *= .25
    torch.testing.assert_close(model.predict_latent(x, size, actions).mean, model.teacher(done, size).genes())


@pytest.mark.parametrize("genes", [[[3, 7], [5, -1], [-1, -1]]])
def test_collapse_stays_exact(genes):
    model, (x, size), actions = small(), cells(), acts(genes)
    model.intervention[0] = torch.tensor([.25, 0.])
    for p in model.predictor.mean.parameters(): torch.nn.init.normal_(p, std=.1)
    a, b = (model.predict_latent(x, size, actions, collapse).mean for collapse in (True, False))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_learned_from_training_targets_by_least_squares(screen):
    adata, split, table, _ = screen
    t, model = targeted_values(adata, split), small()
    number = {p: i for i, p in enumerate(table.perturbation)}
    assert {number[p] for p in t.perturbation} <= set(table.rows(adata, split, "train"))
    X, code = adata.X.toarray(), table.codes(adata)
    rows, controls = split.cells(adata, "train"), split.controls(adata, "train")
    pools = match_controls(adata, rows, np.sort(controls))
    for p, g, control, perturbed in t[["perturbation", "gene", "control", "perturbed"]].itertuples(index=False):
        at, g = np.flatnonzero(code[pools.cells] == number[p]), adata.var_names.get_loc(g)
        assert abs(X[pools.cells[at], g].mean() - perturbed) < 1e-5
        assert abs(
            np.mean([X[pools.pool[pools.start[i]:pools.start[i] + pools.size[i]], g].mean()
                     for i in at]) - control) < 1e-5
    learn_interventions_(model, adata, split)
    mode = int(Mode.parse(t["mode"].iloc[0]))
    expected = np.linalg.lstsq(t.control.to_numpy()[:, None], t.perturbed.to_numpy(), rcond=None)[0][0]
    assert abs(model.intervention[mode, 0].item() - expected) < 1e-5 and 0 < expected < 1
    others = [m for m in range(10) if m != mode]
    assert (model.intervention[others] == torch.tensor([1., 0.])).all()


def test_model_and_baselines_are_told_the_same(screen):
    adata, split, *_ = screen
    model = learn_interventions_(small(), adata, split)
    told = with_own_gene(train_mean(test_set(adata, split)), adata, split).provenance["own_gene"]
    assert set(told) == {"crispri"}
    np.testing.assert_allclose(model.intervention[Mode.CRISPRI], [*told["crispri"].values()], rtol=1e-7)


def test_prediction_lowers_the_unseen_target_and_a_baseline_can_too(screen):
    adata, split, table, actions = screen
    model = small()
    learn_interventions_(model, adata, split)
    template = test_set(adata, split)
    with torch.no_grad():
        for g in range(G):
            model.readout.linear.weight[g] = torch.randn(8, generator=torch.Generator().manual_seed(g))
    ps = predictions(Subject(model, adata, split, actions, table), progress=False)
    informed = with_own_gene(train_mean(template, adata, split), adata, split)
    own = own_gene_effects(adata, split)
    names = list(adata.var_names)
    for i, c in enumerate(template.groups["condition"]):
        g = names.index(c.split("+")[0])
        assert np.abs(ps.delta[i]).max() > 0 and own.factor.iloc[0] < 1
        moved = informed.delta[i] - template.train_delta
        assert np.flatnonzero(np.abs(moved) > 1e-9).tolist() == [
            g
        ] and abs(moved[g] - (own.factor.iloc[0] - 1)*template.control_mean[i, g]) < 1e-9
    # per pair, by hand
    first = template.cells.index[0]
    x = torch.from_numpy(adata[template.cells.control.iloc[0]].X.toarray())
    size = torch.tensor(adata.obs.log_library_size[[template.cells.control.iloc[0]]].to_numpy(np.float32))
    a = actions.take(torch.tensor([table.perturbation.index(template.cells.perturbation.iloc[0])]))
    h = model.teacher(x, size)
    with torch.no_grad():
        delta = model.readout.delta(model.predict_latent(x, size, a).mean, h.x, None, h.index)[0].numpy()
    assert np.allclose(delta, ps.cell_delta[0], atol=1e-5), first


def test_what_is_refused():
    x, size = cells()
    with pytest.raises(ValueError, match="needs predicts='change'"): small(predicts="latent")
    with pytest.raises(ValueError, match="actions.genes: missing"):
        small().predict_latent(x, size, acts([[3], [3], [3]])._replace(genes=None))


def test_noise_on_features_stays_inside_the_token():
    actions, widths = acts([[1]]*200), dict(PROTEIN=24, CHEMICAL=4, DNA=20)
    actions = actions._replace(present=torch.tensor([True, True]).repeat(200, 1).index_put((
        torch.tensor([0]), torch.tensor([0])), torch.tensor(False)))
    moved = jittered(actions, widths, 2., torch.Generator().manual_seed(0)).features - actions.features
    assert not moved[0, 0].any() and not moved[:, 1, 20:].any() and jittered(actions, widths, 0.) is actions
    ratio = moved[1:, 1].square().sum(-1).mean()/actions.features[1:, 1].square().sum(-1).mean()
    assert abs(ratio.item() - 4) < .3
