"""Predicted departures from the sum of singles against a growth screen.

1. Interactions are what a parabola through the sums of singles leaves; pairs on one planted pathway stand out.
2. Departures are read for pairs whose members were seen alone, guides together.
3. The truth finds planted interactions, noise around the sum does not: p is uniform then.
4. Growth of real pairs (Norman et al. 2019) gives the interactions that were published."""
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import spearmanr

from biojepa.evaluate.interactions import (
    growth_interactions, interactions_found, predicted_departures, read_fitness
)
from biojepa.predict.baselines import Training, additive
from biojepa.predict.sets import PredictionSet

NAMES = [f"G{i:02}" for i in range(15)]
PAIRS = list(combinations(NAMES, 2))


def pairs_set(name, delta, conditions=None, **provenance):
    "A bare set of predicted pairs."
    conditions = conditions or ["+".join(p) for p in PAIRS]
    groups = pd.DataFrame(
        dict(perturbation=[f"{c}|{i}" for i, c in enumerate(conditions)],
             condition=conditions,
             cell_type="line",
             n_cells=1))
    cells = groups.drop(columns="n_cells").assign(batch="0", control="c", group=np.arange(len(groups)))
    cells.index = [f"cell{i}" for i in range(len(cells))]
    empty = np.zeros((len(groups), delta.shape[1]))
    return PredictionSet(name,
                         tuple(f"gene{i}" for i in range(delta.shape[1])),
                         cells,
                         csr_matrix(np.float32(empty)),
                         csr_matrix(np.float32(empty)),
                         groups,
                         empty,
                         delta,
                         empty[0],
                         "log1p",
                         provenance=provenance)


@pytest.fixture(scope="module")
def planted():
    "Singles, pairs and growth: pairs of one pathway (five of three genes) respond a third of their sum."
    rng = np.random.default_rng(0)
    single = dict(zip(NAMES, rng.normal(.2, .5, (15, 40))))
    one = np.array([NAMES.index(a)//3 == NAMES.index(b)//3 for a, b in PAIRS])
    added = np.stack([single[a] + single[b] for a, b in PAIRS])
    true = np.where(one[:, None], added/3, added)
    weight, fitness = rng.normal(.4, .2, 40), pd.DataFrame(0., [*NAMES, "negative"], [*NAMES, "negative"])
    for (a, b), delta in zip(PAIRS, true):
        fitness.loc[a, b] = fitness.loc[b, a] = -delta@weight + rng.normal(0, .05)
    for a in NAMES: fitness.loc[a, "negative"] = fitness.loc["negative", a] = -single[a]@weight
    return single, added, true, one, fitness


def test_interactions_are_what_the_sums_leave(planted):
    *_, one, fitness = planted
    plain = growth_interactions(read_fitness(fitness), curve=False)
    for a, b in PAIRS[:5]:
        expected = fitness.loc[a, "negative"] + fitness.loc[b, "negative"]
        assert plain.expected.loc[a, b] == pytest.approx(expected)
        assert plain.interaction.loc[b, a] == pytest.approx(fitness.loc[a, b] - expected)
    curved = growth_interactions(read_fitness(fitness)).interaction.to_numpy()
    assert np.isnan(np.diag(curved)).all()
    size = np.abs([curved[NAMES.index(a), NAMES.index(b)] for a, b in PAIRS])
    assert size[one].mean() > 2*size[~one].mean()
    bent = fitness.copy()
    bent.loc[NAMES, NAMES] = plain.expected - .2*plain.expected**2  # all pairs on one curve do not interact
    assert np.nanmax(np.abs(growth_interactions(bent).interaction)) < 1e-9
    assert np.nanmax(np.abs(growth_interactions(bent, curve=False).interaction)) > .1


def test_departures_are_those_of_pairs_whose_members_were_seen(planted):
    single, added, true, *_ = planted
    seen = [g for g in NAMES if g != "G03"]
    training = Training(pd.DataFrame(dict(condition=[f"{g}+ctrl" for g in seen], cell_type="line", n_cells=5)),
                        [(g,) for g in seen], np.stack([single[g] for g in seen]))
    ps = pairs_set("truth", true)
    found = predicted_departures(ps, additive(ps, training, None))
    at = [i for i, p in enumerate(PAIRS) if "G03" not in p]
    # a pair with one member seen is answered with the mean for the other: it is compared all the same
    both = found[~found[["a", "b"]].isin(["G03"]).any(axis=1)].reset_index(drop=True)
    np.testing.assert_allclose(both["size"], np.sqrt(((true - added)[at]**2).mean(1)), atol=1e-9)
    ratio = np.linalg.norm(true[at], axis=1)/np.linalg.norm(added[at], axis=1)
    np.testing.assert_allclose(both["excess"], np.log2(ratio), atol=1e-6)


def test_guides_of_a_pair_count_once_and_fallbacks_do_not(planted):
    delta = np.array([[1., 0], [3, 0], [9, 9]])
    ps = pairs_set("x", delta, ["G00+G01", "G00+G01", "G00+G02"])
    sums = pairs_set("sums", np.zeros((3, 2)), ["G00+G01", "G00+G01", "G00+G02"], fallback=["G00+G02"])
    found = predicted_departures(ps, sums)
    assert found[["a", "b"]].to_numpy().tolist() == [["G00", "G01"]]
    assert found["size"][0] == pytest.approx(np.sqrt(.5)*2)
    with pytest.raises(ValueError, match="no pair whose members"):
        predicted_departures(pairs_set("y", delta[:1], ["G00+ctrl"]), pairs_set("s", delta[:1], ["G00+ctrl"]))
    with pytest.raises(ValueError, match="has other groups"):
        predicted_departures(ps, pairs_set("s", delta[:1], ["G00+G01"]))


def test_planted_interactions_are_found_and_noise_finds_none(planted):
    single, added, true, one, fitness = planted
    growth, sums = growth_interactions(read_fitness(fitness)), pairs_set("sums", added)
    found = interactions_found(predicted_departures(pairs_set("truth", true), sums), growth, n=400)
    assert all(f.rho > f.high and f.p < .02 and f.n == 105 for f in found)
    table = predicted_departures(pairs_set("truth", true), sums)
    value = [abs(growth.interaction.loc[a, b]) for a, b in zip(table["a"], table["b"])]
    assert found[0].rho == pytest.approx(spearmanr(table["size"], value)[0])
    rng, p = np.random.default_rng(1), []
    for _ in range(40):
        noisy = pairs_set("noise", added + rng.normal(0, .2, added.shape))
        p.append(interactions_found(predicted_departures(noisy, sums), growth, n=100)[0].p)
    assert .3 < np.mean(p) < .7 and np.mean(np.array(p) < .1) < .3
    none = interactions_found(predicted_departures(sums, sums), growth, n=10)
    assert np.isnan([f.rho for f in none]).all()


def test_renaming_keeps_a_gene_that_interacts_with_all_from_counting_twice():
    "One gene departs with everyone and another one interacts with everyone: that is one coincidence, not fourteen."
    rng, G = np.random.default_rng(2), 15
    fitness = pd.DataFrame(0., [*NAMES, "negative"], [*NAMES, "negative"])
    noise = rng.normal(0, .01, (G, G))
    fitness.iloc[:G, :G] = noise + noise.T
    fitness.iloc[0, 1:G] = fitness.iloc[1:G, 0] = rng.normal(0, 1, G - 1)
    size = np.array([rng.random() + 2*(a == "G00") for a, b in PAIRS])
    table = pd.DataFrame(PAIRS, columns=["a", "b"]).assign(cell_type="l", size=size, excess=0.)
    found = interactions_found(table, growth_interactions(fitness, curve=False), n=500)[0]
    plain = spearmanr(size, [abs(fitness.loc[a, b]) for a, b in PAIRS])[1]
    assert plain < .01 and found.p > 3*plain


def test_what_cannot_be_read_says_so(planted):
    *_, fitness = planted
    with pytest.raises(ValueError, match="give a square table"): read_fitness(fitness.iloc[:3])
    with pytest.raises(ValueError, match="'control' is not among"): read_fitness(fitness, "control")


def test_real_growth_gives_the_published_interactions(shared):
    "CBL and partners with CNN1 (erythroid synergy), DUSP9 with MAPK1 (phosphatase and kinase): Norman et al. 2019."
    growth = growth_interactions(read_fitness(shared/"norman19_processed_fitnesses.csv"))
    assert growth.interaction.shape == (112, 112)
    pairs = growth.interaction.where(np.triu(np.ones((112, 112), bool), 1)).stack()
    assert len(pairs) == 112*111//2
    ranks = pairs.rank()
    for a, b in (("CBL", "CNN1"), ("CNN1", "UBASH3B"), ("CBL", "UBASH3B")): assert ranks[a, b] <= 10, (a, b)
    assert ranks["DUSP9", "MAPK1"] > len(pairs) - 10
