"""The metrics of the Virtual Cell Challenge 2026 against their definitions.

1. Rank tests are scipy's, calls are gated by the controls alone, p-values are adjusted within a condition.
2. The noise of a profile is the jackknife by the letter; the noise of mean logs has its closed form.
3. Each of the six metrics is what a loop over sets and lists says; the published examples hold.
4. Nothing is won by naming other targets, by claiming noise, or by silence.
5. A repeat of the experiment has no error; a table puts the mean at 0 and the repeat at 1.
6. `cell-eval2`, where it is installed, says the same of the same cells."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from scipy import stats
from screens import held_out_screen

from biojepa.data.network import SimulationSpec
from biojepa.evaluate import calls as rank_calls, challenge as c, counted as k
from biojepa.evaluate.calls import Calls, rank_test, response_calls
from biojepa.evaluate.metrics import METRICS, evaluate, own_targets
from biojepa.evaluate.profiles import (
    BULK_SUM, Profiles, counts_of, drawn_counts, folds_of, jackknife_noise, mean_profiles, summed_profiles
)
from biojepa.predict.baselines import oracle, train_mean
from biojepa.predict.sets import Pseudobulk, pseudobulk, test_set

SPACES = ("summed counts", "log cells")


@pytest.fixture(scope="module")
def case():
    "A screen of two lines with eight held-out targets."
    spec = dict(n_genes=80, n_cells=2400, n_targets=16, n_cell_types=2, n_modules=6, zero_fraction=.2, seed=2)
    return held_out_screen(SimulationSpec(**spec), 8)


@pytest.fixture(scope="module")
def counted(case):
    "The planted truth, counted."
    adata, split, template = case
    ps = oracle(template, adata)
    return pseudobulk(ps), k.count_responses(ps, adata, split)


def made_calls(rng, C, G, share=.3):
    "Calls with ties, zeros and genes that were not tested."
    tested = rng.random((C, G)) < .9
    p = np.round(rng.random((C, G))**(1/share), 2)
    lfc = np.round(rng.normal(0, 1, (C, G)), 1)
    return Calls(lfc, np.where(tested, p, 1), np.where(tested, np.minimum(1, np.round(1.5*p, 2)), 1), tested)


@pytest.fixture(scope="module")
def random_calls(counted):
    "Made-up calls of both sides, on the conditions of the case."
    bulk, real = counted
    rng, shape = np.random.default_rng(4), bulk.observed.shape
    seen = made_calls(rng, *shape)
    said = made_calls(rng, *shape)._replace(tested=seen.tested)
    return bulk, real._replace(observed=real.observed._replace(calls=seen),
                               predicted=real.predicted._replace(calls=said), whole=seen)


# --- 1. calls

def test_rank_tests_are_those_of_scipy():
    rng = np.random.default_rng(0)
    code, control = rng.integers(0, 6, 300), rng.poisson(1, 90)*1.
    cells = rng.poisson(1 + .4*code)*1.
    expected = [stats.mannwhitneyu(cells[code == g], control, use_continuity=False, method="asymptotic").pvalue
                for g in range(6)]
    np.testing.assert_allclose(rank_test(cells, code, control, 6), expected, rtol=1e-10)
    assert rank_test(cells, code, control, 7)[6] == 1 and rank_test(0*cells, code, 0*control,
                                                                    6).tolist() == [1]*6


def test_calls_are_gated_by_the_controls_and_adjusted_within_a_condition():
    rng = np.random.default_rng(1)
    counts = sp.csr_matrix(rng.poisson(2, (60, 30)).astype(np.float32))
    control = rng.poisson(2, (50, 30)).astype(np.float32)
    control[:, :3] = 0      # shown by perturbed cells alone
    calls = response_calls(counts, np.repeat([0, 1], 30), 2, sp.csr_matrix(control))
    assert not calls.tested[:, :3].any() and calls.tested[:, 3:].all() and (calls.p_adjusted[:, :3] == 1).all()
    cpm, base = ((1e6/x.sum(1, keepdims=True))*x
                 for x in (counts.toarray().astype(float), control.astype(float)))
    p = [stats.mannwhitneyu(cpm[30:, g], base[:, g], use_continuity=False, method="asymptotic").pvalue
         for g in range(3, 30)]
    np.testing.assert_allclose(calls.p[1, 3:], p, rtol=1e-8)
    order = np.argsort(p)
    adjusted = np.minimum.accumulate((np.array(p)[order]*27/np.arange(1, 28))[::-1])[::-1]
    np.testing.assert_allclose(calls.p_adjusted[1, 3:][order], np.minimum(adjusted, 1), rtol=1e-8)
    np.testing.assert_allclose(calls.lfc[1, 3:], np.log2(cpm[30:].mean(0)[3:]/base.mean(0)[3:]), rtol=1e-6)


# --- 2. profiles and their noise

def test_groups_tested_in_blocks_are_called_as_they_are_alone(monkeypatch):
    rng, code = np.random.default_rng(3), np.random.default_rng(4).integers(0, 7, 400)
    cells, control = (sp.csr_matrix(rng.poisson(2., (n, 9)).astype(np.float32)) for n in (400, 90))
    at_once = response_calls(cells, code, 7, control)
    blocks = rank_calls.blocks_of_groups(code, 7, 150)
    assert 2 < len(blocks) < 7 and np.concatenate(blocks).tolist() == [*range(7)]
    assert max(np.isin(code, groups).sum() for groups in blocks) <= 150
    assert [b.tolist() for b in rank_calls.blocks_of_groups(code, 7, 10)] == [[g] for g in range(7)]
    for g in range(7):
        alone = response_calls(cells[code == g], np.zeros((code == g).sum(), int), 1, control)
        for one, other in zip(at_once, alone): np.testing.assert_allclose(one[[g]], other, rtol=1e-12)
    monkeypatch.setattr(rank_calls, "blocks_of_groups", lambda *x: blocks)
    for one, other in zip(at_once, response_calls(cells, code, 7, control)): np.testing.assert_array_equal(one, other)


def test_noise_is_the_jackknife_by_the_letter():
    X = np.random.default_rng(2).poisson(1., (12, 40)).astype(float)
    v = np.stack([np.log1p(BULK_SUM*r.sum(0)/r.sum()) for r in (np.delete(X, i, 0) for i in range(12))])
    expected = 11/12*((v - v.mean(0))**2).sum()
    for block in (2**22, 60, 12):
        assert jackknife_noise(sp.csr_matrix(X), block) == pytest.approx(expected)
    assert jackknife_noise(sp.csr_matrix(X[:1])) == 0
    two = summed_profiles(sp.csr_matrix(np.r_[X, X[:5]]), np.repeat([1, 0], [12, 5]), 2)
    assert two.noise[1] == pytest.approx(expected) and two.n_cells.tolist() == [5, 12]
    np.testing.assert_allclose(two.mean[1], np.log1p(BULK_SUM*X.sum(0)/X.sum()))


def test_noise_of_mean_logs_is_their_variance_over_cells():
    X = np.random.default_rng(3).poisson(2., (9, 20)).astype(np.float32)
    logs = np.log1p(1e4*X/X.sum(1, keepdims=True))
    found = mean_profiles(sp.csr_matrix(X), np.zeros(9, int), 1)
    np.testing.assert_allclose(found.mean[0], logs.mean(0), rtol=1e-5)
    assert found.noise[0] == pytest.approx(logs.var(0, ddof=1).sum()/9, rel=1e-4)


def test_drawn_cells_keep_the_intended_means_and_whole_numbers():
    counts = sp.csr_matrix(np.random.default_rng(5).poisson(3, (1600, 6)).astype(np.float32))
    fold = np.array([[1, 1, 1, 1, 1, 1], [0, .3, .9, 1.1, 2.5, 4]])
    drawn = drawn_counts(counts, fold, np.repeat([0, 1], 800), seed=1)
    assert not (drawn.data % 1).any() and (drawn[:800] != counts[:800]).nnz == 0
    ratio = np.asarray(drawn[800:].sum(0)/counts[800:].sum(0)).ravel()
    np.testing.assert_allclose(ratio, fold[1], atol=.12)
    empty = np.asarray((drawn[800:].toarray() == 0).mean(0))   # as of cells with more or less of a transcript
    np.testing.assert_allclose(empty, np.exp(-3*fold[1]), atol=.04)
    deep = sp.csr_matrix(np.c_[np.repeat([1, 9], 800), np.repeat([10, 90], 800)].astype(np.float32))
    more = drawn_counts(deep, np.array([[2., 1]]), np.zeros(1600, int))[:, [0]].toarray().ravel()
    assert more[:800].mean() == pytest.approx(2, abs=.15) and more[800:].mean() == pytest.approx(18, abs=.5)  # by depth
    half = drawn_counts(counts*.3, fold, np.repeat([0, 1], 800))    # no whole numbers: scaled
    np.testing.assert_allclose(half[800:].toarray(), .3*counts[800:].toarray()*fold[1], rtol=1e-5)


def test_the_oracle_is_read_as_the_planted_fold(case):
    adata, split, template = case
    planted = oracle(template, adata, as_delta=False).delta
    shown = template.control_mean > 0
    np.testing.assert_allclose(np.log(folds_of(oracle(template, adata)))[shown], planted[shown], atol=1e-6)


# --- 3. metrics, by loops

def lines(bulk): return bulk.conditions.groupby("cell_type").indices.values()


@pytest.mark.parametrize("space", SPACES)
def test_discrimination_by_hand(counted, space):
    bulk, real = counted
    found, genes = c.pds_cosine(bulk, real, space), ~own_targets(bulk).any(0)
    for rows in lines(bulk):
        for i in rows:
            said = (real.predicted.profiles[space].mean - real.observed.control[space].mean)[i, genes]
            d = {
                j:
                1 -
                said@(x :=
                      (real.observed.profiles[space].mean - real.observed.control[space].mean)[j, genes])/
                np.linalg.norm(said)/np.linalg.norm(x) for j in rows
            }
            nearer = sum(d[j] < d[i] for j in rows)
            assert found[i] == pytest.approx(1 - nearer/(len(rows) - 1))
    assert .8 < found.mean() <= 1


@pytest.mark.parametrize("space", SPACES)
def test_expression_error_by_hand(counted, space):
    bulk, real = counted
    noisy = real.predicted.profiles[space]._replace(noise=real.observed.profiles[space].noise*1.5)
    real = real._replace(predicted=real.predicted._replace(profiles=real.predicted.profiles | {space: noisy}))
    seen, said, base = real.observed.profiles[space], noisy, real.observed.control[space]
    ratios = []
    for rows in lines(bulk):
        N = D = 0
        kept = {
            i: [g for g, gene in enumerate(bulk.genes) if gene not in bulk.conditions["targets"][i]]
            for i in rows
        }
        claims = {i: min(said.noise[i], seen.noise[i])/len(kept[i]) for i in rows}
        spread = 0
        for g in range(len(bulk.genes)):
            has = [i for i in rows if g in kept[i]]
            w = np.array([1/len(kept[i]) for i in has])
            x = said.mean[has, g]
            spread += (w*(x - (w*x).sum()/w.sum())**2).sum() if len(has) > 1 else 0
        factor = min(1, spread/sum(claims.values()))
        for i in rows:
            k = kept[i]
            N += (((said.mean[i, k] - seen.mean[i, k])**2).sum() - seen.noise[i])/len(k) - factor*claims[i]
            D += (((seen.mean[i, k] - base.mean[i, k])**2).sum() - seen.noise[i] - base.noise[i])/len(k)
        ratios.append(N/D)
    assert c.expression_error(bulk, real, space) == pytest.approx(np.mean(ratios))


def test_the_four_metrics_of_calls_by_hand(random_calls):
    bulk, real = random_calls
    seen, said = real.observed.calls, real.predicted.calls
    found = {
        f.__name__: f(bulk, real)
        for f in (c.direction_fidelity, c.direction_reach, c.significant_jaccard, c.lfc_error)
    }
    for i, targets in enumerate(bulk.conditions["targets"]):
        genes = [g for g, gene in enumerate(bulk.genes) if gene not in targets and seen.tested[i, g]]
        R = {g for g in genes if seen.p_adjusted[i, g] < .05}
        P = {g for g in genes if said.p_adjusted[i, g] < .05}
        decided = {g for g in genes if seen.lfc[i, g] != 0}
        right = {g for g in decided if said.lfc[i, g]*seen.lfc[i, g] > 0}
        assert found["direction_fidelity"][i] == pytest.approx(len(P & right)/max(len(P & decided), len(R)))
        key = lambda g: (said.p_adjusted[i, g] >= .05, said.p_adjusted[i, g], said.p[i, g], -abs(said.lfc[
            i, g]), bulk.genes[g])
        hits = [g in right for g in sorted(R & decided, key=key)]
        deepest = max([k for k in range(1, len(hits) + 1) if sum(hits[:k])/k >= .9], default=0)
        assert found["direction_reach"][i] == pytest.approx(deepest/len(R))
        assert found["significant_jaccard"][i] == pytest.approx(len(R & P)/len(R | P))
        error = sum(abs(said.lfc[i, g] - seen.lfc[i, g]) for g in R)/sum(abs(seen.lfc[i, g]) for g in R)
        assert found["lfc_error"][i] == pytest.approx(error) if len(R) >= 10 else np.isnan(
            found["lfc_error"][i])
    assert np.ptp(found["direction_reach"]) > 0 and np.isfinite(found["lfc_error"]).any()


def one_condition(seen, said):
    "A condition whose genes all have p 0.01 on the observed side; `said` gives p and lfc of the predicted one."
    G = len(seen)
    bulk = pd.DataFrame(dict(condition=["T+ctrl"], cell_type="a", n_cells=9, targets=[("T",)]))
    pb = Pseudobulk("x", tuple(f"g{i:02}" for i in range(G)), bulk, *np.zeros((3, 1, G)), None, np.zeros(G))
    p, lfc = np.array(said, float).T
    real = Calls(np.array([seen], float), np.full((1, G), .01), np.full((1, G), .01), np.ones((1, G), bool))
    said = Calls(lfc[None], p[None], p[None], np.ones((1, G), bool))
    sides = [k.Side({}, {}, x) for x in (real, said)]
    return pb, k.Counted(*sides, real)


def test_published_examples():
    "A leading miss and nine hits reach the end; nine hits before a miss at place eight reach seven."
    hits = [(.001*(i + 1), 1.) for i in range(10)]
    assert c.direction_reach(*one_condition([-1] + [1]*9, hits)) == 1
    assert c.direction_reach(*one_condition([-1] + [1]*8, hits[:9])) == 0
    assert c.direction_reach(*one_condition([1]*7 + [-1]*2, hits[:9])) == pytest.approx(7/9)
    silent = [(1., 0.)]*10
    assert c.direction_fidelity(*one_condition([1]*10, silent)) == c.significant_jaccard(
        *one_condition([1]*10, silent)) == 0
    assert c.lfc_error(*one_condition([1, -2]*5, silent)) == 1      # silence is wrong by all of it
    assert np.isnan(c.lfc_error(*one_condition([1]*9, silent[:9])))
    half = [(.01, 1.)]*5 + [(1., 1.)]*5
    assert c.direction_fidelity(*one_condition([1]*10, half)) == .5     # all right, half of the coverage


def test_where_no_gene_responds():
    pb, real = one_condition([1]*3, [(1., 1.)]*3)
    none = real.observed.calls._replace(p_adjusted=np.ones((1, 3)))
    real = real._replace(observed=real.observed._replace(calls=none), whole=none)
    assert c.significant_jaccard(pb, real) == 1 and np.isnan(
        [c.direction_fidelity(pb, real), c.direction_reach(pb, real)]).all()


# --- 4. what cannot be won

def test_naming_other_targets_wins_nothing(counted):
    "Every prediction lowers the targets of the other conditions: were only its own target left out, it would be found."
    bulk, real = counted
    others = own_targets(bulk).any(0) & ~own_targets(bulk)
    base = real.observed.control["summed counts"].mean
    spiked = real.predicted.profiles["summed counts"]._replace(mean=base - 2.*others)
    cheat = real._replace(predicted=real.predicted._replace(profiles={"summed counts": spiked}))
    assert c.pds_cosine(bulk, cheat).tolist() == [.5]*len(bulk.conditions)


def test_claimed_noise_is_capped(counted):
    bulk, real = counted
    def score(noise, mean=None):
        said = real.predicted.profiles["summed counts"]
        said = said._replace(noise=noise, mean=said.mean if mean is None else mean)
        return c.expression_error(
            bulk, real._replace(predicted=real.predicted._replace(profiles={"summed counts": said})))
    own = real.observed.profiles["summed counts"].noise
    assert score(own) == score(100*own) < score(0*own)
    base = real.observed.control["summed counts"].mean
    assert score(own, base) == pytest.approx(score(0*own, base),
                                             abs=1e-9)  # profiles that are all alike owe none


def test_the_target_itself_counts_nowhere(counted):
    bulk, real = counted
    own, said = own_targets(bulk), real.predicted.calls
    changed = said._replace(lfc=np.where(own, -said.lfc, said.lfc),
                            p_adjusted=np.where(own, 1 - said.p_adjusted, said.p_adjusted))
    profiles = {k: p._replace(mean=np.where(own, 9., p.mean)) for k, p in real.predicted.profiles.items()}
    other = real._replace(predicted=real.predicted._replace(calls=changed, profiles=profiles))
    for name in (*c.CHALLENGE, "pds_cosine_log", "expression_error_log"):
        np.testing.assert_allclose(METRICS[name].function(bulk, other),
                                   METRICS[name].function(bulk, real),
                                   err_msg=name)


# --- 5. both ends

def test_a_perfect_answer_is_best(counted):
    bulk, real = counted
    perfect = real._replace(predicted=real.observed)
    for name in c.CHALLENGE:
        if name == "expression_error": continue     # takes its noise off twice
        value = np.nanmean(METRICS[name].function(bulk, perfect))
        if name != "direction_fidelity": assert value == pytest.approx(METRICS[name].best), name
        else: assert value == pytest.approx(1)


def test_a_repeat_has_no_error_and_nothing_has_all_of_it():
    "Cells drawn twice from one truth; 300 of each of six conditions."
    rng, G = np.random.default_rng(7), 60
    level = rng.gamma(2, 2, G)
    truth = level*np.exp(rng.normal(0, .3, (6, G)))
    code = np.repeat(np.arange(6), 300)
    draw = lambda mean, n=1: sp.csr_matrix(rng.poisson(np.repeat(mean, n, 0)).astype(np.float32))
    control = draw(level[None], 900)
    a, b = (k.side_of_cells(draw(truth[code]), code, 6, control) for _ in range(2))
    silent = a._replace(profiles=a.control)
    conditions = pd.DataFrame(dict(condition=[f"T{i}+ctrl" for i in range(6)], cell_type="a", n_cells=300,
                                   targets=[(f"T{i}",) for i in range(6)]))
    pb = Pseudobulk("x", tuple(f"g{i}" for i in range(G)), conditions, *np.zeros((3, 6, G)), None, np.zeros(G))
    for space in SPACES:
        assert abs(c.expression_error(pb, k.Counted(a, b, a.calls), space)) < .03
        assert abs(c.expression_error(pb, k.Counted(a, silent, a.calls), space) - 1) < .05


def test_lines_are_scored_apart_and_in_order(case, counted):
    adata, split, template = case
    bulk, both = counted
    for line, rows in bulk.conditions.groupby("cell_type").indices.items():
        alone = adata[(adata.obs["cell_type"] == line).to_numpy()].copy()
        ps = oracle(test_set(alone, split), alone)
        real = k.count_responses(ps, alone, split)
        np.testing.assert_allclose(real.observed.profiles["summed counts"].mean,
                                   both.observed.profiles["summed counts"].mean[rows])
        np.testing.assert_array_equal(real.observed.calls.p, both.observed.calls.p[rows])
        np.testing.assert_allclose(real.predicted.profiles["summed counts"].mean,
                                   both.predicted.profiles["summed counts"].mean[rows], rtol=1e-6)


def test_conditions_counted_some_at_a_time_say_the_same(case, counted):
    adata, split, template = case
    _, both = counted
    some = k.lines_of(template, adata, split, most=len(template)//3)
    assert len(some) > len(k.lines_of(template, adata, split)) and max(len(x.rows) for x in some) > 1
    apart = k.joined([x.side() for x in some], [x.rows for x in some])
    for space, profiles in apart.profiles.items():
        np.testing.assert_array_equal(profiles.mean, both.observed.profiles[space].mean)
        np.testing.assert_array_equal(apart.control[space].mean, both.observed.control[space].mean)
    for found, whole in zip(apart.calls, both.observed.calls): np.testing.assert_array_equal(found, whole)


def test_table_runs_from_the_mean_to_the_repeat(case):
    adata, split, template = case
    sets = [template, train_mean(template), oracle(template, adata)]
    scores = c.challenge_scores(sets, adata, split, deals=2, progress=False)
    table = c.challenge_table(scores)
    s = table.xs("s", axis=1, level=1)
    np.testing.assert_allclose(s.loc["train_mean"], 0, atol=1e-12)
    np.testing.assert_allclose(s.loc["replicate"], 1)
    assert s.loc["oracle", "all"] > .5 > s.loc["control_mean", "all"] and s["expression_error"].between(
        0, 1).all()
    u = scores.query("method == 'oracle' and metric == 'lfc_error'")["value"].mean()
    assert table["lfc_error", "u"]["oracle"] == pytest.approx(u)
    again = scores.query("method == 'replicate' and metric == 'pds_cosine'").groupby("seed")["value"].mean()
    assert len(again) == 2 and table["pds_cosine", "u"]["replicate"] == pytest.approx(again.mean())
    assert s.loc["oracle", "all"] == pytest.approx(s.loc["oracle", list(c.CHALLENGE)].mean())


def test_halves_of_the_repeat_share_no_cell(case, monkeypatch):
    adata, split, template = case
    given = []
    monkeypatch.setattr(k, "side_of_cells", lambda cells, code, n, control: given.append((cells, control)) or
                        k.Side({"x": Profiles("x", *np.zeros((3, n)))}, {}, Calls(*np.ones((4, n, 1)))))
    k.replicate_responses(template, adata, split, whole=Calls(*np.ones((4, 1, 1))))
    rows = [sum((sp.csr_matrix(x).shape[0] for x in pair), 0) for pair in given]
    total = len(template) + len(split.controls(adata, "test"))
    assert sum(rows) == total and len(given) == 4
    for (a, x), (b, y) in (given[:2], given[2:]):
        for one, other in ((a, b), (x, y)):
            assert not {tuple(r) for r in one.toarray()} & {tuple(r) for r in other.toarray()}


def test_a_file_of_logarithms_can_be_counted(case):
    adata, split, template = case
    logged = adata.copy()
    del logged.layers["counts"]
    real = k.count_responses(train_mean(template), logged, split)
    assert np.isfinite(real.predicted.calls.lfc).all() and real.observed.calls.significant().any()


def test_what_cannot_be_counted_says_so(case):
    adata, split, template = case
    with pytest.raises(ValueError, match="pds_cosine needs counts"): evaluate(template, ["pds_cosine"])
    with pytest.raises(ValueError, match="lacks cells of the set"):
        k.count_responses(template, adata[:50].copy(), split)
    alone = replace(
        template,
        cells=template.cells.iloc[:1].assign(group=0),
        observed=template.observed[:1],
        control=template.control[:1],
        groups=template.groups.iloc[[template.group[0]]].assign(n_cells=1).reset_index(drop=True),
        control_mean=template.control_mean[:1],
        delta=template.delta[:1])
    with pytest.raises(ValueError, match="1 conditions have a single cell"):
        k.replicate_responses(alone, adata, split)


# --- 6. the package itself

@pytest.mark.slow
def test_cell_eval_says_the_same_of_the_same_cells(case, tmp_path):
    package = pytest.importorskip("cell_eval2")
    adata, split, template = case
    line = k.lines_of(template, adata, split)[0]
    ps, bulk = oracle(template, adata), pseudobulk(template)
    names = bulk.conditions["condition"].iloc[line.rows].str.replace("+ctrl", "", regex=False).to_numpy()
    observed, paired = (counts_of(adata, rows) for rows in (line.own, line.beside))
    drawn = drawn_counts(paired, folds_of(ps), ps.group[line.at])
    for name, cells in dict(real=observed, said=drawn).items():
        obs = pd.DataFrame(
            dict(target=np.r_[names[line.code],
                              np.repeat("non-targeting", line.control.shape[0])]))
        held = AnnData(sp.vstack([cells, line.control], format="csr").astype(np.float32),
                       obs=obs.set_index(obs.index.astype(str)),
                       var=pd.DataFrame(index=list(ps.genes)))
        held.write_h5ad(tmp_path/f"{name}.h5ad")
    config = package.EvalConfig.from_preset("vcc2026")
    config = replace(config, device="cpu", num_threads=1, de=replace(config.de, backend="scanpy"))
    theirs = pd.DataFrame(
        package.compute_metrics(str(tmp_path/"said.h5ad"), str(tmp_path/"real.h5ad"),
                                config=config).to_dicts())
    sides = [k.side_of_cells(x, line.code, len(names), line.control) for x in (line.cells, drawn)]
    few = bulk._replace(conditions=bulk.conditions.iloc[line.rows].reset_index(drop=True),
                        observed=bulk.observed[line.rows])
    ours = k.Counted(*sides, sides[0].calls)
    value = theirs.pivot(index="perturbation", columns="metric", values="value").astype(float).loc[names]
    for name, other in dict(pds_cosine="pds_cosine",
                            direction_fidelity="de_wilcoxon_direction_fidelity_yield_raw",
                            direction_reach="de_wilcoxon_direction_reach_raw",
                            lfc_error="de_wilcoxon_lfc_nmae",
                            significant_jaccard="de_wilcoxon_sig_jaccard").items():
        np.testing.assert_allclose(METRICS[name].function(few, ours), value[other], rtol=1e-6, err_msg=name)
    error, response = c.error_parts(few, ours)
    np.testing.assert_allclose(error, value["expr_mse_unbiased_capped"], rtol=1e-6)
    np.testing.assert_allclose(response, value["expr_distance_unbiased"], rtol=1e-6)
