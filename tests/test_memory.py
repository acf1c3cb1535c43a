"""Relations as features, and the memory of training perturbations.

1. The heat kernel is the matrix exponential of the normalised adjacency; features' products are its cosine.
2. Left-out answers are those of a process fitted without the row; clusters and trees leave the row out, too.
3. A combination is the sum of its members; a gene without relations gets the train mean and says so.
4. Relations dealt anew give the train mean's answers.
5. Combinations, intervals and further tables are weighed by left-out answers.
"""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.linalg import expm
from sklearn.ensemble import RandomForestRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from biojepa.actions.banks import FeatureBank
from biojepa.actions.diffusion import adjacency, diffused_features, heat_columns, relation_components
from biojepa.actions.members import (
    apart, cluster_labels, forest_weights, grown_forest, kernel_of, left_out_answers, process_weights,
    prototype_weights
)
from biojepa.actions.memory import MEMBERS, fit_memory, row_correlations, stack_weights
from biojepa.actions.vocabulary import Modality
from biojepa.config import MemoryConfig


@pytest.fixture(scope="module")
def planted():
    "Four modules of 25 genes; relations mostly inside; responses by module; 60 were measured."
    rng = np.random.default_rng(3)
    module = np.repeat(np.arange(4), 25)
    genes = [f"g{i:02d}" for i in range(100)]
    near = (module[:, None] == module) & (rng.random((100, 100)) < .2)
    i, j = np.nonzero(np.triu(near | (rng.random((100, 100)) < .01), 1))
    edges = pd.DataFrame(
        dict(a=np.array(genes)[i], b=np.array(genes)[j], db=np.where(rng.random(len(i)) < .6, "x", "y")))
    response = rng.normal(size=(4, 150))[module] + .7*rng.normal(size=(100, 150)) + rng.normal(size=150)
    seen = np.sort(rng.permutation(100)[:60])
    bank = diffused_features(edges, genes, width=30)
    return dict(genes=genes,
                edges=edges,
                response=response,
                seen=seen,
                asked=np.setdiff1d(np.arange(100), seen),
                bank=bank,
                memory=fit_memory([(genes[s], ) for s in seen], response[seen], bank))


def test_heat_is_the_matrix_exponential(planted):
    A, _ = adjacency(planted["edges"])
    degree = np.asarray(A.sum(1)).ravel()
    exact = expm(3*A.toarray()/np.sqrt(np.outer(degree, degree)))
    np.testing.assert_allclose(heat_columns(A, np.arange(A.shape[0]), 3., 20), exact, atol=1e-5)


def test_products_of_components_are_cosines_of_heat(planted):
    A, names = adjacency(planted["edges"])
    H = heat_columns(A, np.arange(len(names)), 6., 30).astype(float)
    cosine = H/np.sqrt(np.outer(np.diag(H), np.diag(H)))
    found, F = relation_components(planted["edges"], names, len(names))
    assert list(found) == list(names)
    np.testing.assert_allclose(F @ F.T, cosine, atol=5e-3)


def test_every_gene_of_the_table_has_features_block_by_block(planted):
    bank = diffused_features(planted["edges"], planted["genes"][:40], width=12)
    assert bank.provenance["blocks"] == ["x", "y", "all"] and bank.width == 36
    assert set(bank.keys) == set(planted["edges"].a) | set(planted["edges"].b)


def test_left_out_answers_are_those_of_a_process_fitted_without_the_row():
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(25, 3)), rng.normal(size=(25, 4))
    K = RBF(1.3)(X)
    _, weights = process_weights(K, .2)
    for i in (0, 11, 24):
        rest = np.delete(np.arange(25), i)
        other = GaussianProcessRegressor(RBF(1.3), alpha=.2, optimizer=None).fit(X[rest], Y[rest])
        np.testing.assert_allclose(weights[i] @ Y, other.predict(X[i:i + 1])[0], atol=1e-8)


def test_prototypes_are_sharpened_means_of_clusters_without_the_row_itself():
    rng = np.random.default_rng(1)
    Y = rng.normal(size=(30, 3))
    labels, = cluster_labels(Y, [5])
    shares = rng.random((30, labels.max() + 1))
    got = prototype_weights(shares.copy(), labels, 2., left_out=True) @ Y
    for i in range(30):
        share = shares[i]**2/(shares[i]**2).sum()
        expected = np.zeros(3)
        for c, s in enumerate(share):
            others = [j for j in range(30) if labels[j] == c and j != i]
            if others: expected += s*Y[others].mean(0)
        np.testing.assert_allclose(got[i], expected, atol=1e-9)


def test_a_forest_as_weights_answers_as_the_library_does_seen_and_left_out():
    rng = np.random.default_rng(7)
    X, asked = (rng.normal(size=(n, 6)).astype(np.float32) for n in (50, 20))
    Y = np.stack([X[:, 0] > 0, X[:, 1]*X[:, 2]], 1) + .1*rng.normal(size=(50, 2))
    forest = grown_forest(X, Y, 80)
    library = RandomForestRegressor(80, max_features=1/3, min_samples_leaf=2, random_state=0, oob_score=True).fit(X, Y)
    np.testing.assert_allclose(forest_weights(forest, X, asked) @ Y, library.predict(asked), atol=1e-12)
    left_out = forest_weights(forest, X)
    np.testing.assert_allclose(left_out @ Y, library.oob_prediction_, atol=1e-12)
    assert not left_out.diagonal().any()


def test_a_member_that_is_not_asked_for_has_no_weight(planted):
    genes, seen = planted["genes"], planted["seen"]
    for name in MEMBERS:
        memory = fit_memory([(genes[s],) for s in seen], planted["response"][seen], planted["bank"],
                            MemoryConfig(members=(name,)))
        assert (memory.stack.any(1) == [name == m for m in MEMBERS]).all()


def test_stack_weights_are_never_negative_and_leave_out_what_says_nothing():
    rng = np.random.default_rng(2)
    Y = rng.normal(size=(200, 3))
    good, noise = Y + .5*rng.normal(size=Y.shape), rng.normal(size=Y.shape)
    weights = stack_weights([good, noise], Y)
    assert (weights >= 0).all() and weights[1].max() < .15 and weights[0].min() > .6
    assert stack_weights([-good], Y).max() == 0


def test_unseen_targets_are_answered_better_than_by_the_mean(planted):
    genes, asked, memory = planted["genes"], planted["asked"], planted["memory"]
    answer = memory.answer([(genes[a],) for a in asked])
    r = row_correlations(answer.delta, planted["response"][asked]).mean()
    assert r > row_correlations(np.tile(memory.mean, (len(asked), 1)), planted["response"][asked]).mean() + .15
    assert abs(row_correlations(memory.change(memory.left_out()), planted["response"][planted["seen"]]).mean() - r) < .1


def test_a_training_target_is_surer_than_an_unseen_one_and_a_stranger_is_not_known(planted):
    genes, memory = planted["genes"], planted["memory"]
    answer = memory.answer([(genes[planted["seen"][0]],), (genes[planted["asked"][0]],), ("NOWHERE",)])
    assert answer.reliability[0] > answer.reliability[1] > answer.reliability[2] == 0
    assert answer.known.tolist() == [True, True, False]
    np.testing.assert_array_equal(answer.delta[2], memory.mean)


def test_a_combination_is_the_sum_of_its_members(planted):
    a, b = (planted["genes"][i] for i in planted["asked"][:2])
    memory = planted["memory"]
    K, _ = memory.kernel([(a,), (b,), (a, b)])
    np.testing.assert_allclose(K[2], K[0] + K[1])
    single, pair = memory.answer([(a,), (b,)]), memory.answer([(a, b)])
    assert pair.known[0]
    np.testing.assert_allclose(pair.delta[0], single.delta.sum(0))  # no combination was trained on: their sum
    np.testing.assert_allclose(memory.change(pair.recall), pair.delta)


def test_an_answer_leans_on_targets_that_are_related(planted):
    genes, memory = planted["genes"], planted["memory"]
    for a in planted["asked"][:8]:
        leaning = memory.leaning([(genes[a],)], n=3)
        assert np.mean([genes.index(g)//25 == a//25 for g in leaning.leans_on]) >= 2/3


def test_relations_dealt_anew_give_the_train_mean(planted):
    genes, bank, seen, asked = (planted[k] for k in ("genes", "bank", "seen", "asked"))
    dealt = FeatureBank(tuple(np.random.default_rng(5).permutation(bank.keys)), bank.values, bank.modality,
                        bank.provenance)
    memory = fit_memory([(genes[s],) for s in seen], planted["response"][seen], dealt)
    blind = row_correlations(memory.answer([(genes[a],) for a in asked]).delta, planted["response"][asked])
    mean = row_correlations(np.tile(memory.mean, (len(asked), 1)), planted["response"][asked])
    assert not memory.stack.any() and planted["memory"].stack.mean() > .2
    np.testing.assert_allclose(blind, mean)


def test_a_bank_of_sequences_is_one_block(planted):
    rng = np.random.default_rng(0)
    bank = FeatureBank(("a", "b", "c"), rng.normal(size=(3, 5)), Modality.PROTEIN, dict(featurizer="kmer"))
    distance = apart([bank], ["a", "b", "z"], ["a", "b", "c"])["kmer"]
    assert np.diag(distance)[:2].tolist() == [0, 0] and distance[2].tolist() == [1, 1, 1]
    assert kernel_of({"features": distance}, {"features": 2.})[2, 0] == pytest.approx(np.exp(-1))


def test_left_out_answers_take_the_mean_without_the_row_too():
    rng = np.random.default_rng(4)
    delta, W = rng.normal(size=(9, 6)), rng.random((9, 9))/9
    np.fill_diagonal(W, 0)
    added = left_out_answers(W, delta - delta.mean(0))
    for i in range(9):
        rest = np.delete(np.arange(9), i)
        mean = delta[rest].mean(0)
        np.testing.assert_allclose(added[i], W[i, rest] @ (delta[rest] - mean), atol=1e-12)


def test_a_left_out_answer_does_not_know_its_own_response(planted):
    """What is said of a left-out target does not move along its own response, but for choices shared by all."""
    genes, seen, response = planted["genes"], planted["seen"], planted["response"].copy()
    memory = planted["memory"]
    fixed = MemoryConfig(noises=(memory.noise,), components=(memory.stack.shape[1],), pooled=1.)
    def said(response):
        m = fit_memory([(genes[s],) for s in seen], response[seen], planted["bank"], fixed)
        return m.change(m.left_out())[7], m.answer([(genes[seen[7]],)]).delta[0]
    before = said(response)
    response[seen[7]] += 3*np.random.default_rng(0).normal(size=150)
    moved = [np.linalg.norm(after - b) for after, b in zip(said(response), before)]
    assert moved[0] < moved[1]/3


def test_combinations_are_weighed_by_left_out_training_combinations():
    "Planted: a pair does half of the sum of what its members do; with pairs in training, that is found."
    rng = np.random.default_rng(6)
    genes = [f"g{i}" for i in range(20)]
    single, bank = rng.normal(size=(20, 80)), FeatureBank(tuple(genes), rng.normal(size=(20, 8)), Modality.PROTEIN, {})
    pairs = [(genes[i], genes[j]) for i in range(0, 12) for j in range(i + 1, 12)]
    both = np.stack([.5*(single[genes.index(a)] + single[genes.index(b)]) for a, b in pairs])
    memory = fit_memory([(g,) for g in genes] + pairs[:40], np.concatenate([single, both[:40]]), bank)
    r = row_correlations(memory.answer(pairs[40:]).delta, both[40:])
    assert r.mean() > .97 and memory.sums[-1] == pytest.approx(.5, abs=.1)
    np.testing.assert_allclose(memory.answer(pairs[40:]).delta, both[40:], atol=1.2)


def test_intervals_hold_what_they_promise(planted):
    genes, asked, memory = planted["genes"], planted["asked"], planted["memory"]
    said = memory.answer([(genes[a],) for a in asked])
    inside = np.abs(said.delta - planted["response"][asked]) <= 1.96*said.sd
    assert .91 < inside.mean() < .99
    assert not memory.spread.min() < 0 and (memory.growth >= 0).all()


def test_intervals_hold_where_answers_are_largest(planted):
    "Planted: targets of unequal strength, so that errors grow with the answer; without that term the largest suffer."
    genes, seen, asked, module = planted["genes"], planted["seen"], planted["asked"], np.repeat(np.arange(4), 25)
    held = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        response = rng.gamma(2, 1, size=(100, 1))*rng.normal(size=(4, 150))[module] + .3*rng.normal(size=(100, 150))
        memory = fit_memory([(genes[s],) for s in seen], response[seen], planted["bank"])
        said, left_out = memory.answer([(genes[a],) for a in asked]), memory.change(memory.left_out())
        even = replace(memory, growth=np.eye(3)[0])
        even = replace(even, spread=np.sort(np.abs(response[seen] - left_out), 0)[57]/1.96)   # the 58th of 60
        largest = np.argsort(-np.abs(said.delta), axis=1)[:, :15]
        inside = [np.abs(said.delta - response[asked]) <= 1.96*m.width(said.variance, said.delta)*m.spread
                  for m in (memory, even)]
        held.append([(part.mean(), np.take_along_axis(part, largest, 1).mean()) for part in inside])
        assert memory.growth[2] > 0
    (all_genes, largest), (_, evenly) = np.mean(held, 0)
    assert .93 < all_genes < .97 and largest > .9 > evenly + .02


def test_few_targets_get_wide_intervals():
    "Six targets have no 95 % order statistic: Student's t gives what they lack; exact for errors that are Gaussian."
    rng, held = np.random.default_rng(0), []
    for _ in range(40):
        genes = [f"g{i}" for i in range(7)]
        bank = FeatureBank(tuple(genes), rng.normal(size=(7, 4)), Modality.PROTEIN, {})
        response = rng.normal(size=(7, 80))
        memory = fit_memory([(g,) for g in genes[:6]], response[:6], bank)
        said = memory.answer([(genes[6],)])
        held.append((np.abs(said.delta[0] - response[6]) <= 1.96*said.sd[0]).mean())
    assert .93 < np.mean(held) < .98


def test_another_table_joins_as_a_further_kernel(planted):
    "What relations do not say is in a second bank; left-out answers give each its weight, noise gets none."
    rng = np.random.default_rng(8)
    genes, seen, asked = planted["genes"], planted["seen"], planted["asked"]
    kind = rng.integers(3, size=100)
    response = planted["response"] + 1.5*rng.normal(size=(3, 150))[kind]
    told = FeatureBank(tuple(genes), np.eye(3)[kind] + .1*rng.normal(size=(100, 3)), Modality.PROTEIN,
                       dict(featurizer="kind"))
    noise = FeatureBank(tuple(genes), rng.normal(size=(100, 6)), Modality.PROTEIN, dict(featurizer="noise"))
    def r(*banks):
        memory = fit_memory([(genes[s],) for s in seen], response[seen], banks)
        said = memory.answer([(genes[a],) for a in asked]).delta
        return memory, row_correlations(said, response[asked]).mean()
    (_, one), (memory, both) = r(planted["bank"]), r(planted["bank"], told, noise)
    assert both > one + .03 and memory.block_weights["noise"] < memory.block_weights["kind"]
    with pytest.raises(ValueError, match="two blocks are called 'kind'"): r(told, told)


def test_left_out_answers_decide_which_table_is_used(planted):
    "Beside relations: a table that tells kinds of responses apart gets weight, the same table dealt anew nearly none."
    genes, seen, weights = planted["genes"], planted["seen"], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        kind = rng.integers(3, size=100)
        response = planted["response"] + 1.5*rng.normal(size=(3, 150))[kind]
        told = pd.DataFrame(rng.normal(size=(3, 20))[kind] + .5*rng.normal(size=(100, 20)), genes)
        beside = dict(told=told, dealt=told.set_axis(rng.permutation(genes)))
        bank = diffused_features(planted["edges"].drop(columns="db"), genes, width=30, beside=beside)
        memory = fit_memory([(genes[s],) for s in seen], response[seen], bank, MemoryConfig(members=("process",)))
        weights.append(memory.block_weights)
    told, dealt = (np.array([w[name] for w in weights]) for name in ("told", "dealt"))
    assert (told > 0).all() and (dealt < told).all() and dealt.mean() <= .2*told.mean()


@pytest.mark.parametrize("wrong, message", [
    (dict(delta=np.zeros((3, 5))), "found shape"),
    (dict(perturbations=[("a",)]*3, delta=np.zeros((3, 5))), "at least 4"),
    (dict(delta=np.full((4, 5), np.nan)), "NaN or infinite"),
    (dict(perturbations=[("a",), ("b",), ("a",), ("c",)]), "a stands twice"),
    (dict(perturbations=[("a",), ("b",), (), ("c",)]), "without a target"),
])
def test_what_cannot_be_remembered_is_refused(planted, wrong, message):
    given = dict(perturbations=[("a", ), ("b", ), ("c", ), ("d", )],
                 delta=np.zeros((4, 5)),
                 features=planted["bank"]) | wrong
    with pytest.raises(ValueError, match=message): fit_memory(**given)
