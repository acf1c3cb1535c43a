"The simulator against closed forms, dense algebra and its own truth."
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare, kstest, nbinom

from biojepa.data.network import SimulationSpec, radius_bound, steady_state
from biojepa.data.simulate import simulate_perturb_seq, stack_sparse

SMALL = SimulationSpec(n_genes=120, n_cells=1500, n_targets=12, n_modules=4, n_control_guides=2)
WIDE = replace(SMALL, n_cells=3000, n_doubles=6, n_cell_types=2, n_batches=2, crispra_fraction=0.25)
# no spread but the negative binomial's own
PLAIN = dict(library_sd=0, cell_state_sd=0, batch_sd=0, n_batches=1, n_control_guides=1, guides_per_target=1)


@pytest.fixture(scope="module")
def default():
    return simulate_perturb_seq()


@pytest.fixture(scope="module")
def wide():
    return simulate_perturb_seq(WIDE)


def same(a, b)->bool:
    "Equal, through dictionaries and arrays."
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return np.array_equal(a, b)


# ---- the form ----

def test_default_is_fast_and_as_large_as_promised(default):
    start = time.process_time()
    simulate_perturb_seq()
    assert time.process_time() - start < 5
    assert default.shape == (5000, 600)
    assert default.obs["condition"].nunique() == 61


def test_counts_are_sparse_raw_and_sorted(wide):
    assert sp.issparse(wide.X) and wide.X.format == "csr" and wide.X.dtype == np.float32
    assert wide.X.has_canonical_format and wide.X.indices.dtype == np.int32
    assert (wide.X.data >= 1).all() and (wide.X.data == np.round(wide.X.data)).all()


def test_obs_follow_the_contract(wide):
    obs, truth = wide.obs, wide.uns["truth"]
    text = ["condition", "batch", "cell_type", "guide_id", "mode", "guide_seq_a", "guide_seq_b", "perturbation"]
    assert all(obs[c].dtype.name == "category" for c in text)
    assert wide.obs_names.is_unique and wide.var_names.is_unique and list(wide.var["gene_name"]) == list(
        wide.var_names)
    control = (obs["condition"] == "ctrl").to_numpy()
    known = obs["condition"].astype(str) + "|" + obs["guide_id"].astype(str)
    assert (obs["perturbation"].astype(str) == np.where(control, "ctrl", known)).all()
    assert (obs.loc[control, "mode"] == "control").all() and set(obs.loc[~control,
                                                                         "mode"]) == {"crispri", "crispra"}
    assert set(obs["condition"]) == {"ctrl", *truth["condition"]}
    for name in truth["double"]: assert name.split("+") == sorted(name.split("+")) and "ctrl" not in name
    assert obs.groupby("condition", observed=True)["mode"].nunique().max() == 1
    assert obs[~control].groupby("condition",
                                 observed=True)["guide_id"].nunique().eq(WIDE.guides_per_target).all()


def test_gem_groups_hold_one_line_and_have_controls(wide):
    groups = wide.obs.groupby("batch", observed=True)
    assert len(groups) == WIDE.n_cell_types*WIDE.n_batches
    assert (groups["cell_type"].nunique() == 1).all()
    assert (groups["condition"].agg(lambda c: (c == "ctrl").sum()) >= 1).all()
    assert np.ptp(groups.size()) <= 1


def test_every_gem_group_has_a_control_even_when_controls_are_as_few():
    adata = simulate_perturb_seq(replace(SMALL, n_batches=10, control_fraction=10/1500))
    assert (adata.obs[adata.obs["condition"] == "ctrl"]["batch"].value_counts() == 1).all()
    assert adata.obs["batch"].nunique() == 10


def test_sequences_are_sequences(wide):
    singles = wide.obs[wide.obs["condition"].str.endswith("+ctrl")]
    for column in ("guide_seq_a", "guide_seq_b"):
        assert all(len(s) == 20 and set(s) <= set("ACGT") for s in wide.obs[column].unique())
    targets = {c.split("+")[0] for c in singles["condition"].unique()}
    proteins = wide.uns["protein_sequences"]
    assert set(proteins) == targets
    assert all(s[0] == "M" and set(s) <= set("ACDEFGHIKLMNPQRSTVWY") and 80 <= len(s) <= 900
               for s in proteins.values())
    assert singles.groupby("guide_id", observed=True)["guide_seq_a"].nunique().eq(1).all()


def test_a_double_uses_the_spacers_of_its_singles(wide):
    table = wide.obs.astype(str).drop_duplicates("guide_id").set_index("guide_id")
    for guide in [g for g in table.index if "+" in g]:
        a, b = guide.split("+")
        assert table.loc[guide, "guide_seq_a"] == table.loc[a, "guide_seq_a"]
        assert table.loc[guide, "guide_seq_b"] == table.loc[b, "guide_seq_a"]


def test_h5ad_round_trip(wide, tmp_path):
    wide.write_h5ad(tmp_path/"wide.h5ad")
    back = ad.read_h5ad(tmp_path/"wide.h5ad")
    assert (back.X != wide.X).nnz == 0
    assert same(back.uns["truth"], wide.uns["truth"]) and same(back.uns["protein_sequences"],
                                                               wide.uns["protein_sequences"])
    assert back.obs.astype(str).equals(wide.obs.astype(str))
    spec = json.loads(back.uns["truth"]["spec"])
    assert SimulationSpec(**spec | {"guide_efficacy": tuple(spec["guide_efficacy"])}) == WIDE


# ---- the algebra ----

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 30), st.floats(0.05, 1.0))
def testradius_bound_holds_for_any_matrix(seed, n, density):
    W = sp.random(n,
                  n,
                  density=density,
                  random_state=seed,
                  data_rvs=np.random.default_rng(seed).standard_normal).tocsr()
    radius = np.abs(np.linalg.eigvals(W.toarray())).max()
    assert radius <= radius_bound(W)*(1 + 1e-9) + 1e-9
    positive = abs(W) + sp.eye(n)*0.1 + 0.01*np.ones((n, n))  # irreducible: the bound is tight
    exact = np.abs(np.linalg.eigvals(np.asarray(positive))).max()
    assert radius_bound(sp.csr_matrix(positive)) == pytest.approx(exact, rel=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 25))
def teststeady_state_is_the_inverse(seed, n):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((n, n))
    W *= 0.7/np.abs(W).sum(1).max()
    push = rng.standard_normal((n, 3))
    assert np.allclose(steady_state(sp.csr_matrix(W), push), np.linalg.inv(np.eye(n) - W) @ push, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_truth_is_thesteady_state_of_its_own_edges(seed):
    "Rebuild every line's log-folds from the stored edges and guide strengths by dense algebra."
    truth = simulate_perturb_seq(replace(WIDE, seed=seed)).uns["truth"]
    at = {g: i for i, g in enumerate(truth["gene"])}
    source, sink = ([at[g] for g in truth["edges"][k]] for k in ("source", "sink"))
    strength = {}
    for target, s in zip(truth["guides"]["target"], truth["guides"]["strength"]):
        strength.setdefault(target, []).append(s)
    for line in range(WIDE.n_cell_types):
        W = np.zeros((len(at),)*2)
        np.add.at(W, (sink, source), truth["edges"]["weight"][:, line])
        assert np.abs(np.linalg.eigvals(W)).max() < WIDE.spectral_radius + 1e-6
        inverse = np.linalg.inv(np.eye(len(at)) - W)
        for row, name in enumerate(truth["condition"]):
            if not name.endswith("+ctrl"): continue
            t = at[name.split("+")[0]]
            expected = np.mean(strength[name.split("+")[0]])*inverse[:, t]/inverse[t, t]
            assert np.allclose(truth["log_fold_by_cell_type"][line, row], expected, atol=1e-4)
    assert np.allclose(truth["log_fold"], truth["log_fold_by_cell_type"].mean(0), atol=1e-6)


def test_effect_size_and_radius_are_obeyed():
    none = simulate_perturb_seq(replace(SMALL, effect_size=0)).uns["truth"]
    at = {g: i for i, g in enumerate(none["gene"])}
    own = [at[c.split("+")[0]] for c in none["condition"]]
    alone = none["log_fold"].copy()
    alone[np.arange(len(own)), own] = 0
    assert np.abs(alone).max() < 1e-6  # a target touches nothing but itself
    for radius in (0.2, 0.5):
        weight = simulate_perturb_seq(replace(SMALL, spectral_radius=radius)).uns["truth"]["edges"]
        W = sp.csr_matrix(
            (weight["weight"][:, 0], ([at[g] for g in weight["sink"]], [at[g] for g in weight["source"]])),
            shape=(120, 120))
        assert np.abs(np.linalg.eigvals(W.toarray())).max() <= radius + 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 40))
def test_stacking_blocks_is_stacking(seed, heights, room):
    blocks = [np.random.default_rng(seed + i).poisson(0.4, (h, 6)) for i, h in enumerate(heights)]
    stacked = stack_sparse(blocks, (sum(heights), 6), room)
    assert np.array_equal(stacked.toarray(), np.vstack(blocks)) and stacked.has_canonical_format


# ---- the noise ----

def test_a_gene_is_negative_binomial():
    "Without library, state and batch spread, each gene's counts follow scipy's distribution."
    adata = simulate_perturb_seq(replace(SMALL, n_cells=4000, n_targets=1, control_fraction=0.9, **PLAIN))
    truth, X = adata.uns["truth"], adata.X[(adata.obs["condition"] == "ctrl").to_numpy()].toarray()
    mean, phi, p_values = np.exp(truth["baseline"][0]), truth["dispersion"], []
    for g in np.flatnonzero((mean > 0.3) & (mean < 20)):
        law = nbinom(1/phi[g], 1/(1 + phi[g]*mean[g]))
        last = int(law.ppf(0.98))
        expected = np.r_[law.pmf(np.arange(last)), law.sf(last - 1)]*len(X)
        observed = np.r_[[(X[:, g] == k).sum() for k in range(last)], (X[:, g] >= last).sum()]
        p_values.append(chisquare(observed, expected*observed.sum()/expected.sum()).pvalue)
    assert len(p_values) > 50 and kstest(p_values, "uniform").pvalue > 1e-3


def test_dispersion_is_recovered_by_moments():
    adata = simulate_perturb_seq(
        replace(SMALL, n_cells=6000, n_targets=1, control_fraction=0.9, zero_fraction=0.2, **PLAIN))
    truth = adata.uns["truth"]
    X = adata.X[(adata.obs["condition"] == "ctrl").to_numpy()].toarray().astype(float)
    mean = np.exp(truth["baseline"][0])
    estimate = (X.var(0) - X.mean(0))/X.mean(0)**2
    clear = mean > 3
    assert np.median(estimate[clear]/truth["dispersion"][clear]) == pytest.approx(1, abs=0.05)
    assert np.corrcoef(estimate[clear], truth["dispersion"][clear])[0, 1] > 0.9


@pytest.mark.parametrize("zeros", [0.2, 0.4, 0.6, 0.9])
def test_share_of_zeros_is_as_asked(zeros):
    adata = simulate_perturb_seq(replace(SMALL, n_cells=3000, zero_fraction=zeros, control_fraction=0.5))
    X = adata.X[(adata.obs["condition"] == "ctrl").to_numpy()]
    assert 1 - X.nnz/np.prod(X.shape) == pytest.approx(zeros, abs=0.015)


def test_means_and_variances_of_every_condition_match_the_truth():
    "z-scores of condition means, from planted log-folds and the closed-form variance, are standard normal."
    spec = replace(WIDE,
                   n_cells=30_000,
                   n_targets=6,
                   n_doubles=3,
                   guides_per_target=1,
                   library_sd=0.2,
                   cell_state_sd=0.2)
    adata = simulate_perturb_seq(spec)
    truth, obs = adata.uns["truth"], adata.obs.astype(str)
    z, ratio = [], []
    for s, (batch, shift) in enumerate(zip(truth["batch"], truth["batch_shift"])):
        line = s % spec.n_cell_types
        v = np.expm1(truth["log_variance"][line])
        for c, fold in zip(truth["condition"], truth["log_fold_by_cell_type"][line]):
            X = adata.X[((obs["batch"] == batch) & (obs["condition"] == c)).to_numpy()].toarray().astype(float)
            m = np.exp(truth["baseline"][line] + shift + fold)
            variance = m + m**2*((1 + truth["dispersion"])*(1 + v) - 1)
            z.append((X.mean(0) - m)/np.sqrt(variance/len(X)))
            ratio.append(X.var(0, ddof=1)/variance)
    z = np.stack(z)
    assert abs(z.mean()) < 0.15 and z.std() == pytest.approx(1, abs=0.06)
    assert np.median(ratio) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("sd", [0., 0.5])
def test_cells_vary_together_as_the_network_says(sd):
    "Covariance of log-normal rates, cov = m_i m_j (exp(R_i . R_j) - 1), with R rebuilt from the stored edges."
    adata = simulate_perturb_seq(
        replace(SMALL,
                n_cells=8000,
                control_fraction=0.9,
                n_targets=1,
                zero_fraction=0.2,
                **PLAIN | dict(cell_state_sd=sd)))
    truth = adata.uns["truth"]
    X = adata.X[(adata.obs["condition"] == "ctrl").to_numpy()].toarray().astype(float)
    at = {g: i for i, g in enumerate(truth["gene"])}
    W = np.zeros((len(at),)*2)
    np.add.at(W, tuple([at[g] for g in truth["edges"][k]] for k in ("sink", "source")),
              truth["edges"]["weight"][:, 0])
    R = sd*np.linalg.inv(np.eye(len(at)) - W)[:, truth["regulator"]]
    mean, pair = np.exp(truth["baseline"][0]), np.triu_indices(len(at), 1)
    expected, observed = np.expm1(R @ R.T)[pair], (np.cov(X.T)/np.outer(mean, mean))[pair]
    clear = np.minimum.outer(mean, mean)[pair] > 1
    if sd == 0: assert abs(observed[clear]).mean() < 0.02
    else:
        assert np.corrcoef(expected[clear], observed[clear])[0, 1] > 0.8
        assert np.polyfit(expected[clear], observed[clear], 1)[0] == pytest.approx(1, abs=0.1)


def test_size_factors_are_log_normal_with_mean_one(default):
    log_size = np.log(default.obs["true_size_factor"].to_numpy(float))
    assert kstest(log_size, "norm", args=(-0.35**2/2, 0.35)).pvalue > 1e-3
    assert np.exp(log_size).mean() == pytest.approx(1, abs=0.02)


# ---- the biology ----

def delta_of(adata)->tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Observed delta of each single (condition, gene), planted log-fold, row of the target's gene."
    truth, condition = adata.uns["truth"], adata.obs["condition"].to_numpy(str)
    X = adata.X.toarray()
    X = np.log1p(X/X.sum(1, keepdims=True)*1e4)
    singles = np.flatnonzero([c.endswith("+ctrl") for c in truth["condition"]])
    delta = np.stack([X[condition == c].mean(0)
                      for c in truth["condition"][singles]]) - X[condition == "ctrl"].mean(0)
    at = {g: i for i, g in enumerate(truth["gene"])}
    return delta, truth["log_fold"][singles], np.array(
        [at[c.split("+")[0]] for c in truth["condition"][singles]])


@pytest.mark.parametrize("seed", range(3))
def test_module_foretells_a_held_out_target_better_than_the_mean(seed):
    adata = simulate_perturb_seq(replace(SimulationSpec(), seed=seed))
    delta, planted, target = delta_of(adata)
    module, n = adata.uns["truth"]["module"][target], len(delta)
    def score(predict):
        pair = lambda i: (np.delete(x, target[i]) for x in (predict(i, np.arange(n) != i), delta[i]))
        return np.array([np.corrcoef(*pair(i))[0, 1] for i in range(n)])
    mean = score(lambda i, o: delta[o].mean(0))
    by_module = score(lambda i, o: delta[o & (module == module[i])].mean(0))
    oracle = score(lambda i, o: planted[i])
    gain = by_module - mean
    assert gain.mean() > 3*gain.std()/np.sqrt(n) and oracle.mean() > by_module.mean()
    assert 0.1 < mean.mean() < 0.5 < oracle.mean() < 0.8  # a competitor and a ceiling as real screens have
    severity = np.sqrt((planted**2).mean(1))
    assert np.quantile(severity, 0.95) > 2*np.quantile(severity, 0.05)
    assert (planted > 0.1).any(1).all() and (planted < -0.1).any(1).all()  # mixed signs in every response


def test_stronger_guides_leave_less_of_their_target():
    adata = simulate_perturb_seq(replace(SMALL, n_cells=8000, zero_fraction=0.2))
    truth, umi = adata.uns["truth"], np.ravel(adata.X.sum(1))
    guide, condition = adata.obs["guide_id"].to_numpy(str), adata.obs["condition"].to_numpy(str)
    assert len(set(truth["guides"]["strength"])) == 24
    def share(cells, gene): return adata.X[cells][:, list(truth["gene"]).index(gene)].sum()/umi[cells].sum()
    left = np.array([
        np.log(share(guide == g, t)/share(condition == "ctrl", t))
        for g, t in zip(truth["guides"]["guide_id"], truth["guides"]["target"])
    ])
    assert np.corrcoef(left, truth["guides"]["strength"])[0,
                                                          1] > 0.9  # strength is signed, as is what is left
    gap, seen = (np.diff(x.reshape(-1, 2), axis=1).ravel() for x in (truth["guides"]["strength"], left))
    clear = np.abs(gap) > 0.5
    assert clear.sum() >= 4 and (np.sign(gap) == np.sign(seen))[clear].all()


def test_guide_strengths_span_the_efficacy_asked_for():
    strength = simulate_perturb_seq(replace(SMALL,
                                            guide_efficacy=(0.3, 0.6))).uns["truth"]["guides"]["strength"]
    assert (strength <= np.log(0.7)).all() and (strength >= np.log(0.4)).all() and strength.std() > 0.05


def test_doubles_are_additive_plus_the_planted_interaction(wide):
    for adata, planted in ((wide, True), (simulate_perturb_seq(replace(WIDE, interaction=0)), False)):
        truth = adata.uns["truth"]
        row = {c: i for i, c in enumerate(truth["condition"])}
        at = {g: i for i, g in enumerate(truth["gene"])}
        for name, interaction in zip(truth["double"], truth["interaction"]):
            a, b = name.split("+")
            extra = truth["log_fold"][row[name]] - truth["log_fold"][row[f"{a}+ctrl"]] - truth["log_fold"][
                row[f"{b}+ctrl"]]
            assert np.allclose(extra, interaction, atol=1e-5)
            assert np.abs(extra[[at[a], at[b]]]).max() < 1e-5
            assert (np.abs(extra).max() > 1e-3) == planted


def test_crispra_is_crispri_the_other_way_round():
    down, up = (simulate_perturb_seq(replace(SMALL, crispra_fraction=f)) for f in (0, 1))
    assert np.allclose(down.uns["truth"]["log_fold"], -up.uns["truth"]["log_fold"], atol=1e-6)
    assert set(down.obs["mode"]) == {"control", "crispri"} and set(up.obs["mode"]) == {"control", "crispra"}
    _, planted, target = delta_of(up)
    assert (planted[np.arange(len(target)), target] > 0).all()


def test_lines_differ_in_baseline_and_in_part_of_their_responses(wide):
    truth = wide.uns["truth"]
    a, b = truth["log_fold_by_cell_type"]
    similar = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)]
    assert 0.3 < np.mean(similar) < 0.99 and np.std(truth["baseline"][0] - truth["baseline"][1]) > 0.2
    twins = simulate_perturb_seq(replace(WIDE, line_rewiring=0, line_sd=0)).uns["truth"]
    assert np.array_equal(*twins["log_fold_by_cell_type"]) and np.array_equal(*twins["baseline"])


# ---- the features ----

def composition(texts, k)->np.ndarray:
    "Normalised k-mer counts."
    found = [Counter(t[i:i + k] for i in range(len(t) - k + 1)) for t in texts]
    kmers = sorted(set().union(*found))
    counts = np.array([[f[m] for m in kmers] for f in found], float)
    return counts/np.linalg.norm(counts, axis=1, keepdims=True)


@pytest.mark.parametrize("kind,k", [("protein", 1), ("protein", 2), ("guide", 2)])
def test_composition_tells_the_module_only_if_asked(kind, k):
    correct, chance = {True: [], False: []}, []
    for seed in range(3):
        for informative in correct:
            adata = simulate_perturb_seq(
                SimulationSpec(n_genes=200,
                               n_cells=600,
                               n_targets=100,
                               n_modules=5,
                               seed=seed,
                               informative_features=informative))
            module = dict(zip(adata.uns["truth"]["gene"], adata.uns["truth"]["module"]))
            if kind == "protein": targets, texts = zip(*adata.uns["protein_sequences"].items())
            else:
                table = adata.obs.astype(str).query("condition != 'ctrl'").drop_duplicates("condition")
                targets = table["condition"].str.split("+").str[0]
                texts = table["guide_seq_a"] + table["guide_seq_b"]
            label = np.array([module[t] for t in targets])
            X = composition(texts, k)
            near = X @ X.T - 2*np.eye(len(X))
            correct[informative].append((label[near.argmax(1)] == label).mean())
            chance.append(((label[:, None] == label).sum() - len(label))/(len(label)*(len(label) - 1)))
    assert np.mean(correct[True]) > np.mean(chance) + 0.25
    assert np.mean(correct[False]) < np.mean(chance) + 0.1  # 300 targets: three standard errors are 0.07


def test_the_feature_switch_changes_nothing_but_the_sequences(wide):
    plain = simulate_perturb_seq(replace(WIDE, informative_features=False))
    assert (plain.X != wide.X).nnz == 0 and np.array_equal(plain.uns["truth"]["log_fold"],
                                                           wide.uns["truth"]["log_fold"])
    assert plain.uns["protein_sequences"] != wide.uns["protein_sequences"]


# ---- the seed ----

def test_same_seed_same_everything(wide):
    again, other = simulate_perturb_seq(WIDE), simulate_perturb_seq(replace(WIDE, seed=1))
    assert (again.X != wide.X).nnz == 0 and again.obs.equals(wide.obs) and same(
        again.uns["truth"], wide.uns["truth"])
    assert (other.X != wide.X).nnz > 0 and not np.array_equal(other.uns["truth"]["log_fold"],
                                                              wide.uns["truth"]["log_fold"])


def test_simulating_leaves_the_global_stream_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    simulate_perturb_seq(SMALL)
    assert np.array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize("change", [
    dict(n_batches=2),
    dict(n_cells=2000),
    dict(zero_fraction=0.7),
    dict(library_sd=0.1),
    dict(control_fraction=0.3)
])
def test_the_network_does_not_depend_on_how_it_is_measured(change):
    a, b = (simulate_perturb_seq(s).uns["truth"] for s in (SMALL, replace(SMALL, **change)))
    assert same(a["edges"], b["edges"]) and np.array_equal(a["log_fold"], b["log_fold"])


def test_a_further_line_leaves_the_first_one_alone():
    one, two = (simulate_perturb_seq(replace(SMALL, n_cell_types=n)).uns["truth"] for n in (1, 2))
    assert np.array_equal(one["log_fold_by_cell_type"][0], two["log_fold_by_cell_type"][0])


# ---- bad input ----

@pytest.mark.parametrize("change,message", [
    (dict(n_genes=5), "n_genes: found 5; give an integer from 20"),
    (dict(n_cells=12.5), "n_cells: found 12.5; give an integer"),
    (dict(n_targets=0), "n_targets: found 0"),
    (dict(n_targets=301), "n_targets: found 301 of 600 genes; give at most half of n_genes, 300"),
    (dict(n_modules=61), "n_modules: found 61 for 600 genes; a module needs 10, so give at most 60"),
    (dict(n_doubles=1771), "n_doubles: found 1771; 60 targets have 1770 pairs"),
    (dict(n_doubles=3, n_targets=2, crispra_fraction=0.5), "have 0 pairs of one mode"),
    (dict(n_cells=130), "n_cells: found 130, of which 117 perturbed, for 120 guides"),
    (dict(n_batches=600), "control_fraction: found 0.1 of 5000 cells = 500 controls for 600 gem groups"),
    (dict(guide_efficacy=(0.9, 0.5)), "guide_efficacy: found (0.9, 0.5); give (weakest, strongest)"),
    (dict(guide_efficacy=0.5), "guide_efficacy: found 0.5"),
    (dict(guide_efficacy=(0.5, 1.0)), "guide_efficacy: found (0.5, 1.0)"),
    (dict(spectral_radius=1.0), "spectral_radius: found 1.0"),
    (dict(dispersion=0), "dispersion: found 0"),
    (dict(zero_fraction=float("nan")), "zero_fraction: found nan"),
    (dict(library_sd="wide"), "library_sd: found 'wide'; give a number"),
    (dict(informative_features="no"), "informative_features: found 'no'; give True or False"),
    (dict(seed=-1), "seed: found -1"),
    (dict(n_cells=True), "n_cells: found True"),
])
def test_bad_specifications_are_refused_by_name(change, message):
    with pytest.raises(ValueError) as error: SimulationSpec(**change)
    assert str(error.value).startswith("SimulationSpec.") and message in str(error.value)


def test_the_specification_is_frozen_and_the_simulator_wants_one():
    with pytest.raises(AttributeError): SimulationSpec().n_genes = 3
    with pytest.raises(TypeError, match="n_gens"): SimulationSpec(n_gens=3)
    with pytest.raises(ValueError, match="found dict; give a SimulationSpec"):
        simulate_perturb_seq(asdict(SMALL))


@pytest.mark.parametrize("spec", [
    SimulationSpec(n_genes=20,
                   n_cells=30,
                   n_targets=1,
                   n_modules=1,
                   guides_per_target=1,
                   n_control_guides=1,
                   n_batches=1),
    SimulationSpec(
        n_genes=20, n_cells=100, n_targets=10, n_modules=2, guides_per_target=3, n_doubles=5,
        n_batches=1),
    SimulationSpec(n_genes=40,
                   n_cells=100,
                   n_targets=2,
                   n_modules=4,
                   guides_per_target=1,
                   n_batches=1,
                   cell_state_sd=0,
                   batch_sd=0),
    SimulationSpec(n_genes=np.int64(60),
                   n_cells=257,
                   n_targets=3,
                   n_modules=2,
                   zero_fraction=np.float32(0.99),
                   effect_size=3),
])
def test_edges_of_the_allowed(spec):
    adata = simulate_perturb_seq(spec)
    assert adata.shape == (spec.n_cells, spec.n_genes) and np.isfinite(adata.uns["truth"]["log_fold"]).all()


# ---- the size ----

@pytest.mark.slow
def test_a_full_screen_fits_in_8_gb():
    "5,000 genes x 160,000 cells, 1,087 targets, 48 gem groups, in a process of its own."
    code = """if True:
        import json, resource, sys, time
        from biojepa.data.simulate import SimulationSpec, simulate_perturb_seq
        start = time.perf_counter()
        spec = SimulationSpec(n_genes=5000, n_cells=160_000, n_targets=1087, n_modules=40, n_batches=48,
                              control_fraction=0.066)
        adata = simulate_perturb_seq(spec)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == 'darwin' else 1024)
        measured = dict(seconds=time.perf_counter() - start, peak_gb=peak/1e9)
        print(json.dumps(measured | dict(cells=adata.n_obs, genes=adata.n_vars, nnz=int(adata.X.nnz))))
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    figures = json.loads(out.stdout)
    assert (figures["cells"], figures["genes"]) == (160_000, 5000)
    assert figures["peak_gb"] < 8, figures
    assert figures["seconds"] < 1800, figures
