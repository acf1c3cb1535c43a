"""Metrics against scipy, sklearn and slow loops; best and chance values; the published protocol and its artefact
on the shared data."""
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from scipy import stats
from sklearn.metrics import r2_score

from biojepa.data.datasets import load_dataset
from biojepa.data.preprocess import prepare
from biojepa.data.splits import make_split
from biojepa.evaluate import metrics as m, published as p
from biojepa.evaluate.differential import observed_de
from biojepa.evaluate.metrics import METRICS, Scale, evaluate
from biojepa.evaluate.published import published_protocol, published_table, published_values
from biojepa.predict.sets import PredictionSet, pseudobulk, test_set

N_GENES = 60


def example(seed=0, conditions=("A+ctrl", "B+ctrl", "A+B", "G7+ctrl", "G9+ctrl"), lines=("K562", "RPE1"), n=12):
    """Cells of two lines in which every condition shifts its own genes; two guides for each; genes A and B are
    measured."""
    rng = np.random.default_rng(seed)
    genes = ("A", "B", *(f"G{i}" for i in range(2, N_GENES)))
    shift = {c: rng.normal(0, .6, N_GENES)*(rng.random(N_GENES) < .5) for c in conditions}
    cells, x, c, base = [], [], [], {l: rng.gamma(2, .6, N_GENES) for l in lines}
    for line in lines:
        for condition in conditions:
            for i in range(n + 3*(condition == "A+B")):
                cells.append((f"{condition}|g{i % 2}", condition, "0", line, f"control{i}"))
                x.append(np.maximum(0, base[line] + shift[condition] + rng.normal(0, .4, N_GENES)))
                c.append(np.maximum(0, base[line] + rng.normal(0, .4, N_GENES)))
    cells = pd.DataFrame(cells,
                         columns=["perturbation", "condition", "batch", "cell_type", "control"],
                         index=[f"cell{i}" for i in range(len(x))])
    grouped = cells.groupby(["perturbation", "condition", "cell_type"])
    groups = grouped.size().rename("n_cells").reset_index()
    mean = np.stack([base[l] for l in groups["cell_type"]])
    return PredictionSet("control_mean", genes, cells.assign(group=grouped.ngroup()),
                         sp.csr_matrix(np.float32(x)), sp.csr_matrix(np.float32(c)), groups, mean,
                         np.zeros_like(mean), rng.normal(0, .2, N_GENES), "log1p")


@pytest.fixture(scope="module")
def ps(): return example()


@pytest.fixture(scope="module")
def guess(ps):
    "A prediction that is related to the truth, with one for every cell."
    rng = np.random.default_rng(1)
    delta = .5*(ps.observed_mean() - ps.control_mean) + rng.normal(0, .3, ps.delta.shape)
    cell_delta = (delta[ps.group] + rng.normal(0, .1, ps.control.shape)).astype(np.float32)
    variance, delta_variance = np.full(cell_delta.shape, .3, np.float32), np.full(delta.shape, .04)
    return ps.with_prediction("guess", delta, cell_delta, variance, delta_variance)


@pytest.fixture(scope="module")
def cells(ps):
    "Control cells of both lines as AnnData, for the tests of differential genes."
    rng = np.random.default_rng(2)
    lines = ps.groups.drop_duplicates("cell_type")
    X = np.concatenate(
        [np.maximum(0, ps.control_mean[i] + rng.normal(0, .4, (40, N_GENES))) for i in lines.index])
    obs = pd.DataFrame(dict(condition="ctrl", cell_type=np.repeat(lines["cell_type"].to_numpy(), 40)),
                       index=[f"c{i}" for i in range(len(X))])
    return AnnData(sp.csr_matrix(np.float32(X)), obs=obs, var=pd.DataFrame(index=ps.genes))


class AllControls:
    "Stands for a split of which every control may be used."
    def controls(self, adata, part): return np.arange(adata.n_obs)


@pytest.fixture(scope="module")
def de(ps, cells): return observed_de(ps, cells, AllControls())


def cell_change(ps): return ps.observed.toarray() - ps.control.toarray()


# --- the published protocol
# -------------------------------------------------------------------------------------------

def by_hand(ps):
    "The released quantities by plain loops, from the formulas; Δ unclipped, expression clipped."
    x, c = ps.observed.toarray().astype(float), ps.control.toarray().astype(float)
    change, expression = np.empty_like(x), np.empty_like(x)
    for i in range(len(x)):
        goes_to = ps.control_mean[ps.group[i]] + ps.delta[ps.group[i]]
        change[i] = goes_to - c[i] if ps.cell_delta is None else ps.cell_delta[i]
        expression[i] = [max(0., value) for value in c[i] + change[i]]
    mse, r, shift, undefined = [], [], [], 0
    for observed, predicted, before, after in zip(x - c, change, c, expression):
        mse.append(np.mean((predicted - observed)**2))
        shift.append(np.mean(np.abs(after - before)))
        top = sorted(range(len(observed)), key=lambda g: abs(observed[g]))[-20:]
        if min(np.std(predicted[top]), np.std(observed[top])) <= 1e-9:
            r.append(0.); undefined += 1
        else: r.append(stats.pearsonr(predicted[top], observed[top])[0])
    r2, r2_top = [], []
    for g in range(len(ps.groups)):
        rows = [i for i in range(len(x)) if ps.group[i] == g]
        observed, predicted = x[rows].mean(0), expression[rows].mean(0)
        top = np.argsort(np.abs((x - c)[rows].mean(0)))[-50:]
        r2.append(r2_score(observed, predicted)); r2_top.append(r2_score(observed[top], predicted[top]))
    full = 32*(len(x)//32)
    return dict(mse=np.mean(mse), r_top20_cell=np.mean(r), r2_mean=np.mean(r2), r2_median=np.median(r2),
                r2_top50_mean=np.mean(r2_top), r2_top50_median=np.median(r2_top), shift=np.mean(shift),
                shift_last_batch=np.mean(shift[full - 32:full]), n_undefined=undefined)


@pytest.fixture(scope="module")
def awkward(ps):
    "Cells whose Δ needs clipping, is constant, or was observed to be 0; shifts grow along the cells."
    rng, observed = np.random.default_rng(4), ps.observed.toarray()
    cell_delta = rng.normal(-.5, .6, observed.shape)*np.linspace(.5, 2, len(ps))[:, None]
    cell_delta[[3, 40, 100]] = -.2
    cell_delta[[7, 111]] = 0
    observed[[20, 90]] = ps.control[[20, 90]].toarray()     # an observed Δ of 0
    ps = replace(ps, observed=sp.csr_matrix(observed))
    return ps.with_prediction("awkward", np.zeros_like(ps.delta), cell_delta.astype(np.float32))


@pytest.mark.parametrize("block", [2**22, 3*N_GENES, 1])
def test_protocol_is_the_release_by_hand(ps, guess, awkward, block, monkeypatch):
    whole = p._pass_over_cells
    monkeypatch.setattr(p, "_pass_over_cells", lambda s: whole(s, block))
    for s, n_undefined in ((ps, 0), (guess, 0), (awkward, 7)):
        found, expected = published_protocol(s), by_hand(s)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (s.name, name)
        assert found.keys() == expected.keys() | {"n_cells", "n_perturbations"
                                                  } and found["n_undefined"] == n_undefined
        assert (found["n_cells"], found["n_perturbations"]) == (len(s), len(s.groups))


def test_methods_on_the_same_cells_share_one_pass(ps, guess, awkward, monkeypatch):
    "Every column is what the method scores alone; the awkward cells are others, so they get a pass of their own."
    sets = [guess, ps, awkward, ps.with_prediction("train_mean", np.tile(ps.train_delta, (len(ps.groups), 1)))]
    alone, passes, whole = {s.name: published_protocol(s) for s in sets}, [], p._pass_over_cells
    monkeypatch.setattr(p, "_pass_over_cells", lambda s: (passes.append([x.name for x in s]), whole(s))[1])
    table = published_table(sets).set_index("quantity")
    assert passes == [["guess", "control_mean", "train_mean"], ["awkward"]]
    assert list(table.columns) == ["report", "guess", "awkward", "control_mean", "train_mean", "meaning"]
    for name, expected in alone.items():
        np.testing.assert_allclose([table.loc[q, name] for q in p.MEANING],
                                   [expected[q] for q in p.MEANING],
                                   rtol=1e-12)


def test_the_awkward_cells_are_awkward(awkward):
    "Else the test above would pass with Δ clipped, undefined cells dropped or one shift for the other."
    found, c = published_protocol(awkward), awkward.control.toarray()
    assert 64 < len(awkward) and len(awkward) % 32 and ((c + awkward.cell_delta) < 0).mean() > .1
    clipped = published_protocol(replace(awkward, cell_delta=awkward.cells_predicted() - c))
    assert clipped["mse"] < .95*found["mse"] and abs(clipped["r_top20_cell"] - found["r_top20_cell"]) > .01
    assert clipped["shift"] == pytest.approx(found["shift"], rel=1e-5)
    defined = found["r_top20_cell"]*len(awkward)/(len(awkward) - found["n_undefined"])
    assert abs(defined - found["r_top20_cell"]) > 1e-3 and abs(found["shift_last_batch"] - found["shift"]) > .05


@pytest.mark.parametrize("value", [-.2, .1, 1/3, 1e-4, -7.7])
def test_a_constant_delta_scores_exactly_nothing(ps, value):
    "Whatever float32 makes of the constant, as it is or after it was added to a cell and taken off again."
    c = ps.control.toarray()
    for delta in (np.full(c.shape, value,
                          np.float32), (c + np.float32(value)) - c if abs(value) > .01 else None):
        if delta is None:
            continue
        found = published_protocol(ps.with_prediction("constant", np.full(ps.delta.shape, value), delta))
        assert found["r_top20_cell"] == 0 and found["n_undefined"] == len(ps)


def test_a_small_delta_counts_down_to_the_released_limit(ps):
    "10 times above a standard deviation of 1e-9 the correlation is that of the enlarged Δ; 10 times below it is 0."
    shape, r = cell_change(ps)/cell_change(ps).std(), {}
    for s in (1., 1e-8, 1e-10):
        tiny = ps.with_prediction("tiny", np.zeros_like(ps.delta), np.float32(s)*shape)
        r[s] = published_protocol(tiny)["r_top20_cell"]
    assert r[1.] > .99 and r[1e-8] == pytest.approx(r[1.], abs=1e-6) and r[1e-10] == 0


def test_the_last_full_batch_is_counted_from_the_front(ps):
    """126 cells: the last full batch is cells 64 to 95, and the 30 after it do not count; under 32 cells there is
    none."""
    delta = np.zeros(ps.control.shape, np.float32)
    delta[64:96] = .25
    marked = ps.with_prediction("marked", np.zeros_like(ps.delta), delta)
    assert len(ps) == 126 and p.shift_of_last_batch(marked) == pytest.approx(.25, rel=1e-5)
    assert published_protocol(marked)["shift"] == pytest.approx(.25*32/126, rel=1e-5)
    assert p.shift_of_last_batch(marked, 126) == pytest.approx(.25*32/126, rel=1e-5)
    assert np.isnan(p.shift_of_last_batch(marked, 127))


def test_values_of_perturbations_average_to_the_protocol(guess):
    tidy = published_values(guess)
    part = tidy[tidy["metric"] == "mse"]
    assert np.average(part["value"], weights=part["n_cells"]) == pytest.approx(published_protocol(guess)["mse"])
    assert set(tidy["condition"]) == set(guess.groups["perturbation"])


def test_cells_without_a_correlation_are_counted_and_stay_in_the_mean(ps, awkward):
    "Predicting the control cell itself: its Δ is zero for all twenty genes."
    tidy = published_values(awkward).query("metric == 'r_top20_cell'")
    mean = np.average(tidy["value"], weights=tidy["n_cells"])
    assert mean == pytest.approx(published_protocol(awkward)["r_top20_cell"])
    assert (tidy["n_cells"] - tidy["n_defined"]).sum() == 7
    same = ps.with_prediction("no change", np.zeros_like(ps.delta), np.zeros(ps.control.shape, np.float32))
    found = published_protocol(same)
    assert found["r_top20_cell"] == 0 and found["n_undefined"] == len(ps) and found["shift"] == 0


def test_perfect_cells(ps):
    found = published_protocol(ps.with_prediction("perfect", np.zeros_like(ps.delta), cell_change(ps)))
    assert [found[k]
            for k in ("mse", "r_top20_cell", "r2_mean", "r2_top50_median")] == pytest.approx([0, 1, 1, 1])


def test_table_needs_both_constants(ps, guess):
    mean = ps.with_prediction("train_mean", np.tile(ps.train_delta, (len(ps.groups), 1)))
    table = published_table([ps, guess, mean])
    assert list(table) == ["quantity", "report", "guess", "control_mean", "train_mean", "meaning"]
    by = table.set_index("quantity")
    assert by.loc["mse", "guess"] == published_protocol(guess)["mse"]
    assert np.isnan(by.loc["shift",
                           "report"]) and by.loc["shift_last_batch", "report"] == .5379  # one was published
    for sets in ([guess, ps], [guess, mean], []):
        with pytest.raises(ValueError, match="not among"): published_table(sets)


# --- each metric against something written out
# ------------------------------------------------------------------------

def test_pearson_and_r2_of_rows():
    a, b = np.random.default_rng(0).normal(size=(2, 7, 30)) + 3
    assert p.row_pearson(a, b) == pytest.approx([stats.pearsonr(x, y)[0] for x, y in zip(a, b)])
    assert p.row_r2(a, b) == pytest.approx([r2_score(y, x) for x, y in zip(a, b)])
    assert np.isnan(p.row_pearson(np.full(
        (1, 30), 2.), b[:1])).all() and np.isnan(p.row_pearson(b[:1], np.zeros((1, 30)))).all()
    assert np.isnan(p.row_r2(a[:1], np.ones((1, 30)))).all()


def test_rounding_of_a_constant_is_no_correlation(guess):
    pb = pseudobulk(guess)
    noise = np.random.default_rng(0).normal(size=pb.predicted.shape)*1e-8
    assert np.isnan(m.r_delta_perturbed_mean(pb._replace(predicted=pb.train_delta + noise))).all()
    assert np.isfinite(m.r_delta_perturbed_mean(pb._replace(predicted=pb.train_delta + 1e5*noise))).all()


def test_correlations(guess):
    pb = pseudobulk(guess)
    places = {g: i for i, g in enumerate(pb.genes)}
    for i in range(len(pb.conditions)):
        p, o, t = pb.predicted[i], pb.observed[i], pb.train_delta
        assert m.r_delta(pb)[i] == pytest.approx(stats.pearsonr(p, o)[0])
        assert m.r_delta_perturbed_mean(pb)[i] == pytest.approx(stats.pearsonr(p - t, o - t)[0])
        assert m.mse_delta(pb)[i] == pytest.approx(np.mean((p - o)**2))
        top = np.argsort(-np.abs(o))[:20]
        assert m.r_top20(pb)[i] == pytest.approx(stats.pearsonr(p[top], o[top])[0])
        own = [places[g] for g in pb.conditions["targets"].iloc[i]]
        top = [g for g in np.argsort(-np.abs(o)) if g not in own][:20]
        assert m.r_top20(pb, keep_target=False)[i] == pytest.approx(stats.pearsonr(p[top], o[top])[0])


def test_own_targets(guess):
    pb = pseudobulk(guess)
    both = pb.conditions.index[pb.conditions["condition"] == "A+B"]
    assert [np.flatnonzero(row).tolist() for row in m.own_targets(pb)[both]] == [[0, 1]]*2
    strange = pb._replace(conditions=pb.conditions.assign(targets=[("unmeasured",)]*len(pb.conditions)))
    assert not m.own_targets(strange).any()


def slow_pds(pb):
    "Counted pair by pair."
    panel = {g for targets in pb.conditions["targets"] for g in targets}
    genes = [i for i, g in enumerate(pb.genes) if g not in panel]
    score = []
    for i, line in enumerate(pb.conditions["cell_type"]):
        others = [j for j, l in enumerate(pb.conditions["cell_type"]) if l == line and j != i]
        d = lambda j: np.abs(pb.predicted[i, genes] - pb.observed[j, genes]).sum()
        score.append(1 - sum(1. if d(j) < d(i) else .5 if d(j) == d(i) else 0. for j in others)/len(others))
    return score


def test_pds(guess):
    pb = pseudobulk(guess)
    assert m.pds(pb) == pytest.approx(slow_pds(pb))
    twins = pb.observed.copy(); twins[2] = twins[0]  # two conditions that look the same share the rank
    tied = pb._replace(observed=twins, predicted=twins)
    assert m.pds(tied) == pytest.approx(slow_pds(tied)) and m.pds(tied)[0] == 1 - .5/4
    assert np.isnan(
        m.pds(
            pb._replace(conditions=pb.conditions.iloc[:1],
                        observed=pb.observed[:1],
                        predicted=pb.predicted[:1]))).all()


@pytest.mark.parametrize("seed", range(3))
def test_any_constant_has_pds_one_half(seed):
    pb = pseudobulk(example(seed, [f"G{i}+ctrl" for i in range(10, 31)], ["K562"], 4))
    constant = np.tile(np.random.default_rng(seed).normal(size=N_GENES), (len(pb.conditions), 1))
    assert m.pds(pb._replace(predicted=constant)).mean() == pytest.approx(.5, abs=1e-12)


def test_knowing_only_the_targets_is_not_retrieval(guess):
    pb = pseudobulk(guess)
    known = pb._replace(predicted=np.where(m.own_targets(pb), pb.observed, 0.))
    assert m.pds(known).mean() == pytest.approx(.5)


def test_de_is_welchs_test(ps, cells, de):
    for i, (condition, line) in enumerate(zip(de.conditions["condition"], de.conditions["cell_type"])):
        x = ps.observed[((ps.cells["condition"] == condition) &
                         (ps.cells["cell_type"] == line)).to_numpy()].toarray().astype(float)
        c = cells.X[(cells.obs["cell_type"] == line).to_numpy()].toarray().astype(float)
        t, p = stats.ttest_ind(x, c, equal_var=False)
        kept = (x.var(0) > 0) | (c.var(0) > 0)
        assert np.allclose(de.score[i, kept], t[kept], rtol=1e-3, atol=1e-3)
        assert np.allclose(
            de.p_adjusted[i, kept], stats.false_discovery_control(
                p[kept]), rtol=1e-2, atol=1e-4) or not kept.all()


def test_wilcoxon_finds_about_the_same(ps, cells, de):
    other = observed_de(ps, cells, AllControls(), method="wilcoxon")
    assert np.corrcoef(other.score.ravel(), de.score.ravel())[0, 1] > .9
    with pytest.raises(ValueError, match="found 'anova'"): observed_de(ps, cells, AllControls(), method="anova")


def test_conditions_of_one_cell_are_not_tested(ps, cells):
    lonely = np.r_[0, np.flatnonzero((ps.cells["condition"] != "A+ctrl").to_numpy())]
    table = ps.cells.iloc[lonely]
    groups = ps.groups.iloc[np.unique(table["group"])]
    code = np.searchsorted(groups.index, table["group"])
    part = PredictionSet("x", ps.genes, table.assign(group=code), ps.observed[lonely], ps.control[lonely],
                         groups.assign(n_cells=np.bincount(code)).reset_index(drop=True),
                         ps.control_mean[groups.index], ps.delta[groups.index], ps.train_delta, "log1p")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        de = observed_de(part, cells, AllControls())
    row = de.conditions.index[de.conditions["n_cells"] == 1]
    assert len(row) == 1 and np.isnan(de.p_adjusted[row]).all() and np.isfinite(
        np.delete(de.p_adjusted, row, 0)).all()
    for metric in (m.de_overlap, m.de_direction):
        undefined = pseudobulk(part).conditions[np.isnan(metric(pseudobulk(part), de))]
        assert undefined["n_cells"].tolist() == [1]


def test_de_needs_controls(ps, cells):
    with pytest.raises(ValueError, match="'RPE1' has 0 control cells"):
        observed_de(ps, cells[cells.obs["cell_type"] == "K562"], AllControls())


@pytest.mark.parametrize("n", [5, 20])
def test_overlap_and_direction_counted(guess, de, n):
    pb = pseudobulk(guess)
    overlap = m.de_overlap(pseudobulk(guess), de, n)
    direction = m.de_direction(pseudobulk(guess), de)
    for i, (condition, line) in enumerate(zip(pb.conditions["condition"], pb.conditions["cell_type"])):
        row = np.flatnonzero((de.conditions["condition"] == condition)
                             & (de.conditions["cell_type"] == line))[0]
        significant = np.flatnonzero(de.p_adjusted[row] < .05)
        k = min(n, len(significant))
        assert k > 2
        true, mine = (set(sorted(range(N_GENES), key=lambda g: -abs(d[i, g]))[:k]) for d in (pb.observed, pb.predicted))
        assert overlap[i] == pytest.approx(len(true & mine)/k)
        assert direction[i] == pytest.approx(
            np.mean([np.sign(pb.predicted[i, g]) == np.sign(pb.observed[i, g]) for g in significant]))


def test_overlap_of_drawn_numbers_is_chance_however_noisy_some_genes_are(ps, de):
    pb = pseudobulk(ps)
    rng, G = np.random.default_rng(0), len(pb.genes)
    quiet = np.where(np.arange(G) < G//4, .01, 1.)      # genes whose changes are small, and sure
    changes = quiet*rng.normal(size=pb.observed.shape)
    sure = de._replace(p_adjusted=np.where(np.arange(G) < G//2, 0., 1.) + 0*de.p_adjusted)
    found = [m.de_overlap(pb._replace(observed=changes, predicted=rng.normal(size=changes.shape)), sure, G//4).mean()
             for _ in range(200)]
    assert np.mean(found) == pytest.approx((G//4)/G, abs=.02)
    assert (m.de_overlap(pb._replace(observed=changes, predicted=changes), sure, 5) == 1).all()


def test_de_of_other_data_is_refused(guess, de):
    pb = pseudobulk(guess)
    with pytest.raises(ValueError, match="other genes"): m.de_overlap(pb, de._replace(genes=de.genes[::-1]))
    with pytest.raises(ValueError, match="lacks A\\+B"):
        m.de_direction(pb, de._replace(conditions=de.conditions.replace("A+B", "B+C")))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_ties_share_their_places(k):
    "The mean over every order in which ties can be broken."
    size = np.array([2., 1, 1, 0, 1])
    rng = np.random.default_rng(0)
    broken = [np.isin(np.arange(5), np.lexsort((rng.random(5), -size))[:k]) for _ in range(4000)]
    assert m.top_share(size, k) == pytest.approx(np.mean(broken, 0), abs=.03)
    assert m.top_share(size, k).sum() == pytest.approx(k)


def test_energy_distance(guess):
    rng = np.random.default_rng(0)
    for a, b in ((rng.normal(size=40), rng.normal(1, 2, 70)), (rng.gamma(2, 1, 30), rng.normal(size=30))):
        assert m.energy_between(a[:, None], b[:, None]) == pytest.approx(stats.energy_distance(a, b)**2,
                                                                         abs=1e-6)
    pb, x = pseudobulk(guess), guess.observed.toarray().astype(float)
    for i, (condition, line) in enumerate(zip(pb.conditions["condition"], pb.conditions["cell_type"])):
        rows = np.flatnonzero((guess.cells["condition"] == condition) & (guess.cells["cell_type"] == line))
        d = lambda a, b: np.mean([[np.linalg.norm(p - q) for q in b] for p in a])
        a, b = guess.cells_predicted(rows).astype(float), x[rows]
        assert m.energy_distance(pb, guess)[i] == pytest.approx(2*d(a, b) - d(a, a) - d(b, b), abs=1e-5)
        break


def test_energy_distance_of_equal_cells_is_zero(ps):
    perfect = ps.with_prediction("perfect", np.zeros_like(ps.delta), cell_change(ps))
    assert m.energy_distance(pseudobulk(perfect), perfect) == pytest.approx(0, abs=1e-5)


def test_severity(guess):
    pb = pseudobulk(guess)
    size = [np.sqrt(np.mean(d**2, 1)) for d in (pb.predicted, pb.observed)]
    assert m.severity_r(pb) == pytest.approx(
        stats.pearsonr(*size)[0]) and m.severity_rho(pb) == pytest.approx(stats.spearmanr(*size)[0])
    assert np.isnan(m.severity_rho(pb._replace(predicted=np.tile(pb.predicted[:1], (len(pb.predicted), 1)))))


def test_coverage_of_what_is_truly_gaussian(ps):
    rng = np.random.default_rng(0)
    pb = pseudobulk(ps)
    sd = rng.uniform(.1, 2, pb.observed.shape)
    honest = pb._replace(predicted=pb.observed + sd*rng.normal(size=sd.shape), variance=sd**2)
    for share in (.5, .8, .95): assert m.coverage(honest, share).mean() == pytest.approx(share, abs=.05)
    assert (m.coverage(honest._replace(variance=100*sd**2), .5) > .95).all() and (m.coverage(
        honest._replace(variance=sd**2/1e4), .95) < .15).all()


def test_coverage_of_cells(guess):
    error = np.abs(guess.observed.toarray() - guess.cells_predicted())
    pb, inside = pseudobulk(guess), error <= stats.norm.ppf(.9)*np.sqrt(.3)
    for i, (condition, line) in enumerate(zip(pb.conditions["condition"], pb.conditions["cell_type"])):
        rows = ((guess.cells["condition"] == condition) & (guess.cells["cell_type"] == line)).to_numpy()
        assert m.cell_coverage(pb, guess, .8)[i] == pytest.approx(inside[rows].mean())


def test_half_precision_moves_no_metric_by_a_thousandth(guess):
    "Δ and variances of cells in float16; everything that reads them computes in float32 or better."
    rng = np.random.default_rng(3)
    full = replace(guess, variance=rng.gamma(4, .1, guess.variance.shape).astype(np.float32))
    half = replace(full,
                   cell_delta=full.cell_delta.astype(np.float16),
                   variance=full.variance.astype(np.float16))
    assert half.cells_delta([0]).dtype == half.cells_variance([0]).dtype == half.cells_predicted(
        [0]).dtype == np.float32
    means = [
        pd.concat([evaluate(s), published_values(s)]).groupby("metric")["value"].mean()
        for s in (full, half)
    ]
    assert {"cell_coverage_80", "energy_distance", "mse", "r_top20_cell", "shift"} <= set(means[0].index)
    np.testing.assert_allclose(*means, rtol=1e-3)
    assert means[0]["mse"] != means[1]["mse"]   # it was read in half precision


# --- best, chance, registry
# -------------------------------------------------------------------------------------------

def test_perfect_prediction_is_best(ps, de):
    observed = pseudobulk(ps, by="perturbation").observed
    means = evaluate(ps.with_prediction("perfect", observed, delta_variance=np.ones_like(observed)), de=de)
    for name, value in means.groupby("metric")["value"].mean().items():
        if METRICS[name].level != "cell" and METRICS[name].direction != "nominal":
            assert value == pytest.approx(METRICS[name].best, abs=1e-9), name
    cells = evaluate(ps.with_prediction("perfect", observed, cell_change(ps)), "energy_distance")
    assert cells["value"].mean() == pytest.approx(METRICS["energy_distance"].best, abs=1e-5)


def test_unrelated_prediction_is_chance(cells):
    ps = example(5, [f"G{i}+ctrl" for i in range(10, 50)], ["K562"], 6)
    unrelated = ps.with_prediction("unrelated", np.random.default_rng(9).normal(0, .4, ps.delta.shape))
    tidy = evaluate(unrelated,
                    de=observed_de(ps, cells,
                                   AllControls())).groupby("metric")["value"].agg(["mean", "sem"])
    for name, row in tidy.iterrows():
        if METRICS[name].chance is not None and METRICS[
                name].level == "perturbation" and name != "r_delta_perturbed_mean":
            assert abs(row["mean"] - METRICS[name].chance) < 4*row["sem"], name


def test_evaluate_gives_what_can_be_given(ps, guess, de):
    assert set(evaluate(ps)["metric"]) == {n for n, k in METRICS.items() if set(k.needs) <= {"ps"}}
    full = evaluate(guess, de=de)
    plain = {n: k for n, k in METRICS.items()
             if not {"counts", "weights"} & set(k.needs)}  # others stand in notebooks of their own
    assert set(full["metric"]) == set(plain) and set(full["method"]) == {"guess"}
    assert list(full) == ["method", "metric", "condition", "cell_type", "value", "n_cells"]
    counts = full.groupby("metric").size()
    assert all(counts[n] == (1 if k.level == "panel" else 10) for n, k in plain.items())
    assert set(evaluate(guess, ["pds", "mse_delta"])["metric"]) == {"pds", "mse_delta"}
    with pytest.raises(ValueError, match="de_overlap_20 needs de"): evaluate(guess, ["de_overlap_20"])
    with pytest.raises(ValueError, match="cell_coverage_50 needs cell_variance"):
        evaluate(ps, "cell_coverage_50")
    with pytest.raises(ValueError, match="'r2'; choose among"): evaluate(ps, ["r2"])


def test_registry_says_how_to_read_each_metric():
    for name, k in METRICS.items():
        assert k.name == name and k.label and k.direction in ("higher", "lower",
                                                              "nominal") and k.level in ("perturbation",
                                                                                         "cell", "panel")
        assert k.direction != "nominal" or 0 < k.best < 1
    with pytest.raises(ValueError, match="'pds' is taken"):
        m.metric("perturbation", "another", name="pds")(lambda pb: 0)


def test_a_metric_once_declared_keeps_its_meaning():
    "The same declaration again is allowed, as when a cell is run twice; another direction, space or source is not."
    before = METRICS["pds"]
    same = dict(label=before.label, scale=Scale(chance=.5), standard=before.standard, name="pds")
    m.metric("perturbation", **same)(m.pds)
    assert METRICS["pds"] == before
    for other in (dict(scale=Scale("lower", chance=.5)), dict(scale=Scale(best=0., chance=.5)),
                  dict(standard=before.standard._replace(space="summed counts"))):
        with pytest.raises(ValueError, match="means something else"):
            m.metric("perturbation", **same | other)(m.pds)
    with pytest.raises(AttributeError): METRICS["pds"].standard.space = "counts"
    assert METRICS["pds"] == before


# --- known answers
# ----------------------------------------------------------------------------------------------------

def screen(path, n_test, space="log1p", rows=None, **columns):
    "A shared file with some conditions held out at random."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adata = prepare(load_dataset(path if rows is None else rows(path), **columns), expression_space=space)
    order = np.random.default_rng(1).permutation(
        sorted(set(adata.obs["condition"].astype(str)) - {"ctrl"})).tolist()
    split = make_split(adata,
                       kind="custom",
                       held_out=dict(train=order[n_test:], test=order[:n_test]),
                       allow_empty_val=True)
    return test_set(adata, split)


def constants(control_mean):
    return control_mean, control_mean.with_prediction(
        "train_mean", np.tile(control_mean.train_delta, (len(control_mean.groups), 1)))


def check(found, mse, r, shift, r2, top_mean, top_median):
    "The table of trivial predictors; held-out targets differ, so the R² of the top 50 has some room."
    assert found["mse"] == pytest.approx(mse, rel=.02) and found["r_top20_cell"] == pytest.approx(r, abs=.005)
    assert found["shift"] == pytest.approx(shift, rel=.02) and found["r2_mean"] == pytest.approx(r2, abs=.01)
    assert found["r2_top50_mean"] == pytest.approx(
        top_mean, abs=.05) and found["r2_top50_median"] == pytest.approx(top_median, abs=.05)


def test_known_answers_on_the_twin(shared):
    control, mean = constants(
        screen(shared/"k562_essential_twin.h5ad",
               163,
               batch="gem_group",
               cell_type="cell_type",
               guide="guide_id"))
    check(published_protocol(control), .340, .930, .449, .965, .672, .771)
    values = evaluate(mean, ["r_delta", "r_delta_perturbed_mean", "pds"]).groupby("metric")["value"].mean()
    assert values["r_delta"] == pytest.approx(.324, abs=.02) and values["pds"] == pytest.approx(
        .5, abs=1e-9) and np.isnan(values["r_delta_perturbed_mean"])


def test_known_answers_on_the_twin_logged_twice(shared):
    control, mean = constants(
        screen(shared/"k562_essential_twin.h5ad",
               163,
               "log1p_twice",
               batch="gem_group",
               cell_type="cell_type",
               guide="guide_id"))
    check(published_protocol(control), .666, .952, .652, .930, -.199, -.066)
    check(published_protocol(mean), .662, .954, .661, .936, .001, .119)


def test_known_answers_on_real_cells(shared):
    thp1, _ = constants(
        screen(shared/"papalexi21_thp1_crisprko.h5ad",
               6,
               condition="perturbation",
               control="control",
               batch="batch",
               guide="guide"))
    found = published_protocol(thp1)  # six genes of 25: which ones matters
    assert found["mse"] == pytest.approx(2.03, rel=.05) and found["r_top20_cell"] == pytest.approx(.888,
                                                                                                   abs=.02)
    assert found["shift"] == pytest.approx(.891, abs=.02) and found["r2_mean"] == pytest.approx(.981, abs=.02)


def test_known_answers_on_real_activation(shared):
    import anndata as ad
    k562 = lambda path: (a := ad.read_h5ad(path))[a.obs["cell_type"].astype(str).str.lower() == "k562"].copy()
    control, _ = constants(
        screen(shared/"norman19_mcfaline23_hvg500.h5ad",
               8,
               rows=k562,
               condition="condition",
               control="control",
               cell_type="cell_type"))
    found = published_protocol(control)
    assert found["mse"] == pytest.approx(.0225, rel=.1) and found["r_top20_cell"] == pytest.approx(.731,
                                                                                                   abs=.04)
    assert found["shift"] == pytest.approx(.024, abs=.002) and found["r2_top50_mean"] == pytest.approx(
        .892, abs=.03)
