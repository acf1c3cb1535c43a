"""Calibration: closed forms against integration, Gaussian answers of known uncertainty, best and chance values,
repairs learned on other perturbations, bad input."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats
from scipy.integrate import quad

from biojepa.evaluate import calibration as c, uncertainty as u
from biojepa.evaluate.metrics import cell_coverage, coverage
from biojepa.predict.sets import PredictionSet, pseudobulk


def known(claim=1., seed=0, P=30, n_cells=20, G=40, sd=(.2, .8), equal=True, noise=stats.norm):
    """Independent values around the prediction, standard deviation by perturbation; two guides a condition;
    `claim` times the true variance is predicted."""
    rng, sd = np.random.default_rng(seed), np.linspace(*sd, P)
    n = np.full(P, n_cells) if equal else rng.integers(2, 2*n_cells, P)
    group = np.repeat(np.arange(P), n)
    condition = np.array([f"G{i//2}+ctrl" for i in range(P)])
    groups = pd.DataFrame(
        dict(perturbation=[f"{k}|{i}" for i, k in enumerate(condition)],
             condition=condition,
             cell_type="K562",
             n_cells=n))
    cells = groups.loc[group, ["perturbation", "condition", "cell_type"]].assign(
        batch="0", group=group, control="c").set_axis([f"cell{i}" for i in range(len(group))])
    mean = np.full((len(group), G), 8.)
    x = mean + sd[group, None]*noise.rvs(size=mean.shape, random_state=rng)
    variance, total = claim*np.tile(sd[group, None]**2, G), claim*np.tile(sd[:, None]**2, G)/n[:, None]
    observed, control = sp.csr_matrix(np.float32(x)), sp.csr_matrix(np.float32(mean))
    genes = tuple(f"g{i}" for i in range(G))
    return PredictionSet("known", genes, cells, observed, control, groups, control_mean=np.full((P, G), 8.),
                         delta=np.zeros((P, G)), train_delta=np.zeros(G), expression_space="log1p",
                         cell_delta=np.zeros_like(mean, np.float32), variance=variance.astype(np.float32),
                         delta_variance=total)


@pytest.fixture(scope="module")
def honest(): return known()


@pytest.fixture(scope="module")
def bold(): return known(claim=.25, equal=False)


# --- closed forms
# -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [-2.5, -.3, 0., .8, 4.])
@pytest.mark.parametrize("sd", [.3, 1., 2.5])
def test_crps_is_its_integral(error, sd):
    below = quad(lambda x: stats.norm.cdf(x/sd)**2,
                 -40*sd,
                 error,
                 points=sorted({min(0., error), max(-40*sd, error - sd)}),
                 limit=200)[0]
    above = quad(lambda x: stats.norm.sf(x/sd)**2,
                 error,
                 40*sd + error,
                 points=sorted({max(0., error), error + sd}),
                 limit=200)[0]
    assert c.crps_gaussian(error, sd**2) == pytest.approx(below + above, rel=1e-6)


def test_crps_is_the_energy_form_and_the_absolute_error_without_spread():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1.5, (2, 400_000))
    assert c.crps_gaussian(.7, 2.25) == pytest.approx(np.abs(x - .7).mean() - np.abs(x - y).mean()/2, abs=5e-3)
    assert c.crps_gaussian(np.array([-2., .5]), np.zeros(2)) == pytest.approx([2, .5])
    assert (c.crps_gaussian(np.zeros(3), [0, 1e-6, 1]) >= 0).all()


def test_crps_is_proper():
    "On average the true variance scores best."
    errors = stats.norm.ppf((np.arange(20_000) + .5)/20_000, scale=1.3)
    scores = {v: c.crps_gaussian(errors, np.full(len(errors), v)).mean() for v in (.8, 1.3, 1.69, 2.2, 4.)}
    assert min(scores, key=scores.get) == 1.69


# --- one pass
# ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("level", ["cell", "perturbation"])
def test_one_pass_gives_the_means_of_a_loop_whatever_the_block(bold, level, monkeypatch):
    whole = c.error_blocks
    by_block = []
    for block in (2**22, 3*40):
        monkeypatch.setattr(c, "error_blocks", lambda ps, lv, b=block: whole(ps, lv, b))
        by_block.append(c.calibrate(bold, level))
    a, b = by_block
    assert a.covered == pytest.approx(b.covered) and a.scores.to_numpy() == pytest.approx(b.scores.to_numpy())
    pb = pseudobulk(bold)
    for i, name in enumerate(pb.conditions["condition"]):
        rows = np.flatnonzero(bold.cells["condition"] == name)
        error, variance = pb.observed[i] - pb.predicted[i], pb.variance[i]
        if level == "cell":
            error = bold.observed[rows].toarray().astype(float) - bold.cells_predicted(rows)
            variance = bold.variance[rows].astype(float)
        assert a.scores.loc[i, "mse"] == pytest.approx(
            (error**2).mean()) and a.scores.loc[i, "variance"] == pytest.approx(variance.mean(), rel=1e-5)
        assert a.scores.loc[i,
                            "nll"] == pytest.approx(-stats.norm.logpdf(error, 0, np.sqrt(variance)).mean(),
                                                    rel=1e-5)
        assert a.covered[i, 15] == pytest.approx((np.abs(error) <= stats.norm.ppf(.9)*np.sqrt(variance)).mean())


def test_coverage_is_that_of_the_metrics(bold):
    pb = pseudobulk(bold)
    assert c.calibrate(bold, "perturbation").covered[:, 15] == pytest.approx(coverage(pb, .8))
    assert c.calibrate(bold, "cell").covered[:, 15] == pytest.approx(cell_coverage(pb, bold, .8))


def test_each_cell_is_looked_at_once_for_all_levels(bold, monkeypatch):
    read, plain = [], PredictionSet.cells_predicted
    monkeypatch.setattr(PredictionSet, "cells_predicted", lambda s, rows:
                        (read.extend(np.arange(len(s))[rows]), plain(s, rows))[1])
    c.coverage_curve(c.calibrate(bold, "cell"), n=100)
    assert read == list(range(len(bold)))


# --- honest, bold, perfect, shuffled
# ----------------------------------------------------------------------------------

def test_gaussian_with_its_own_variance_is_honest(honest):
    "Every covered share within its binomial 99.99 % interval; ECE near 0; CRPS the closed form σ/√π."
    cal = c.calibrate(honest, "cell")
    n = honest.observed.shape[0]*40
    for p, share in zip(cal.nominal, cal.covered.mean(0)): assert abs(share - p) < 3.9*np.sqrt(p*(1 - p)/n)
    assert c.calibration_error(cal.covered, cal.nominal) < .005
    sd = np.linspace(.2, .8, 30).reshape(-1, 2).mean(1)[cal.conditions["condition"].str.extract(
        r"G(\d+)", expand=False).astype(int)]
    assert cal.scores["crps"].to_numpy() == pytest.approx(sd/np.sqrt(np.pi), rel=.06)
    means = c.calibrate(replace(honest, delta_variance=honest.delta_variance/2),
                        "perturbation")  # guides add their sds, true means are independent
    assert c.calibration_error(means.covered, means.nominal) < .05


def test_perfect_prediction_has_the_best_scores(honest):
    itself = dict(control=honest.observed, delta=honest.observed_mean() - honest.control_mean)
    certain = dict(variance=np.zeros_like(honest.variance), delta_variance=np.zeros_like(honest.delta_variance))
    perfect = replace(honest, **itself, **certain)
    for level in ("cell", "perturbation"):
        cal = c.calibrate(perfect, level)
        assert cal.scores[["crps", "mse"]].to_numpy() == pytest.approx(0, abs=1e-6)
        if level == "cell": assert (cal.covered == 1).all()
    ideal = u.error_and_variance(honest).assign(variance=lambda t: t["error"])     # claims its own error
    assert u.uncertainty_table(ideal, n=20)["mean"].to_numpy() == pytest.approx(1)


@pytest.mark.parametrize("level", ["cell", "perturbation"])
def test_shuffled_variances_are_chance_within_its_interval(honest, level):
    true = u.uncertainty_table(u.error_and_variance(honest, level), n=100).set_index("metric")
    assert (true["mean"] > true["chance_high"]).all() and (true["mean"] > .5).all()
    inside, means = [], []
    for seed in range(20):
        table = u.uncertainty_table(u.error_and_variance(u.dealt_variance(honest, seed), level),
                                    n=60,
                                    seed=seed)
        inside.append((table["mean"] >= table["chance_low"]) & (table["mean"] <= table["chance_high"]))
        means.append(table["mean"])
    assert np.mean(inside) > .8
    assert (np.abs(np.mean(means, 0)) < 4*stats.sem(means, 0)).all()


def test_shuffling_once_computed_is_shuffling_each_time():
    rng = np.random.default_rng(0)
    error, variance = rng.gamma(2., size=80), rng.gamma(2., size=80).round(1)     # with ties
    again = np.random.default_rng(1)
    each = np.array([u._knows(error, again.permutation(variance)) for _ in range(20)])
    np.testing.assert_allclose(u._shuffled(error, variance, 20, np.random.default_rng(1)), each, atol=1e-12)


def test_equal_variances_know_nothing_and_say_so(honest):
    table = u.error_and_variance(replace(honest, variance=np.ones_like(honest.variance)))
    assert u.uncertainty_table(table, n=20)[["mean", "low", "chance_high"]].isna().all(None)
    flat = u.risk_coverage(table).query("order == 'variance'")
    assert flat["risk"].to_numpy() == pytest.approx(table["error"].mean())


def test_risk_is_the_mean_error_of_what_is_kept(bold):
    table = u.error_and_variance(bold)
    curve = u.risk_coverage(table, points=10**9)
    kept = table.sort_values("error", kind="stable")["error"].expanding().mean()
    assert curve.query("order == 'error'")["risk"].to_numpy() == pytest.approx(kept.to_numpy())
    distinct = table.assign(variance=np.random.default_rng(0).permutation(len(table)))
    expected = distinct.sort_values("variance")["error"].expanding().mean()
    assert u.risk_coverage(distinct,
                           10**9).query("order == 'variance'")["risk"].to_numpy() == pytest.approx(
                               expected.to_numpy())
    assert len(u.risk_coverage(table, 50)) == 100 and u.risk_coverage(table, 50)["kept"].iloc[-1] == 1


def test_table_of_errors_has_every_cell_with_its_own(bold):
    table = u.error_and_variance(bold)
    square = (bold.observed.toarray() - bold.cells_predicted())**2
    assert table["error"].to_numpy() == pytest.approx(square.mean(1), rel=1e-5)
    assert (table["condition"].to_numpy() == bold.cells["condition"].to_numpy()).all()
    assert table["variance"].to_numpy() == pytest.approx(bold.variance.mean(1), rel=1e-5)


# --- repairs
# ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("level", ["cell", "perturbation"])
@pytest.mark.parametrize("kind", ["scale", "conformal"])
def test_a_repair_learned_elsewhere_restores_coverage(bold, level, kind):
    val = known(claim=.25, seed=7, equal=False)
    fit = c.fit_recalibration(val, kind, level)
    before, after = c.calibrate(bold, level), c.calibrate(bold, level, fit)
    errors = [c.calibration_error(x.covered, x.nominal) for x in (before, after)]
    assert errors[0] > .1 and errors[1] < .05
    if kind == "scale":
        if level == "cell": assert fit.scale == pytest.approx(4, rel=.02)
        assert after.scores["crps"].mean() < before.scores["crps"].mean() and after.scores["nll"].mean(
        ) < before.scores["nll"].mean()
    else: assert after.scores[["crps", "nll"]].isna().all(None)


def test_scale_is_the_maximum_of_the_likelihood(bold):
    equal = known(claim=.25, seed=7)
    fit = c.fit_recalibration(equal, "scale")
    def nll(factor): return c.calibrate(equal, "cell", replace(fit, scale=factor)).scores["nll"].mean()
    assert nll(fit.scale) < min(nll(fit.scale*1.02), nll(fit.scale/1.02))


def test_conformal_needs_no_shape(honest):
    "Errors with heavy tails: the factor misses the levels, the conformal widths do not."
    heavy = stats.t(3)
    test, val = known(noise=heavy), known(noise=heavy, seed=5)
    error = {
        k: c.calibration_error((x := c.calibrate(test, "cell", c.fit_recalibration(val, k))).covered,
                               x.nominal) for k in ("scale", "conformal")
    }
    assert error["scale"] > .05 and error["conformal"] < .01
    fit = c.fit_recalibration(val, "conformal")
    z = np.abs(val.observed.toarray() - val.cells_predicted())/np.sqrt(val.variance)
    assert fit.half_width([.5, .9]) == pytest.approx(np.quantile(z, [.5, .9]),
                                                     rel=.01)  # equal groups: plain quantiles


def test_constant_is_the_mean_squared_error_of_each_gene_with_conditions_alike(bold):
    fit = c.fit_recalibration(bold, "constant")
    square = pd.DataFrame((bold.observed.toarray() - bold.cells_predicted())**2)
    square = square.groupby(bold.cells["condition"].to_numpy()).mean()
    assert fit.gene_variance == pytest.approx(square.mean().to_numpy(), rel=1e-5)
    cal = c.calibrate(bold, "cell", fit)
    assert cal.scores["variance"].to_numpy() == pytest.approx(fit.gene_variance.mean())


def test_a_bent_order_cannot_be_repaired(bold):
    "After a recalibration the order of variances is what it was."
    scaled = replace(bold, variance=bold.variance*4)
    a, b = (u.uncertainty_table(u.error_and_variance(s), n=20)["mean"].to_numpy() for s in (bold, scaled))
    assert a == pytest.approx(b)


# --- tables and bad input
# ---------------------------------------------------------------------------------------------

def test_table_and_curve(bold):
    cals = [
        c.calibrate(bold, level, r) for level in ("cell", "perturbation")
        for r in (c.Recalibration(), c.fit_recalibration(bold, "conformal", level))
    ]
    table = c.calibration_table(cals, n=100)
    assert table["recalibration"].tolist() == ["as predicted", "conformal"]*2 and table["n"].tolist() == [15]*4
    assert (table["ece_low"] <= table["ece_high"]).all() and table["covered_80"].iloc[0] == pytest.approx(
        cals[0].covered[:, 15].mean())
    curve = c.coverage_curve(cals[0], n=100)
    assert len(curve) == 19 and (curve["low"] <= curve["covered"]).all() and (curve["covered"]
                                                                              <= curve["high"]).all()
    one = c.calibrate(known(P=2), "perturbation")
    assert np.isnan(c.calibration_table([one])[["ece_low", "crps_high"]].to_numpy()).all()


def no_variance(ps): return ps.with_prediction("train_mean", ps.delta)


@pytest.mark.parametrize("call, message", [
    (lambda s: c.calibrate(s, "gene"), "level: found 'gene'"),
    (lambda s: c.calibrate(no_variance(s)), "train_mean: predicts no variance of a cell"),
    (lambda s: c.calibrate(no_variance(s), "perturbation"), "train_mean: predicts no variance of a "
     "perturbation mean"),
    (lambda s: u.error_and_variance(no_variance(s)), "predicts no variance"),
    (lambda s: c.fit_recalibration(s, "isotonic"), "kind: found 'isotonic'"),
    (lambda s: c.fit_recalibration(replace(s, variance=np.zeros_like(s.variance))), "variances are 0"),
    (lambda s: c.calibrate(s, "perturbation", c.fit_recalibration(s, "scale", "cell")),
     "recalibration: was "
     "learned for a cell"),
    (lambda s: c.calibrate(s, "cell", replace(c.fit_recalibration(s, "constant"),
                                              gene_variance=np.ones(3))), "recalibration: has 3 genes"),
    (lambda s: c.calibrate(s, "cell", c.fit_recalibration(s, "conformal"), nominal=(.5, .99)), "levels: "
     "found 0.99"),
    (lambda s: c.calibration_table([c.calibrate(s)], at=(.99, )), "at: 0.99"),
])
def test_bad_input_is_named(honest, call, message):
    with pytest.raises(ValueError, match=message): call(honest)


def test_a_variance_of_zero_leaves_out_what_cannot_repair_it(honest):
    variance = np.array(honest.variance, float)
    variance[0, 0] = 0
    stuck = replace(honest, variance=variance)
    with pytest.raises(c.ZeroVarianceError, match="1 predicted variances are 0"):
        c.fit_recalibration(stuck, "scale", "cell")
    with pytest.warns(UserWarning, match="'scale' left out"):
        cals = c.compare_calibrations([stuck], [stuck], levels=("cell", ))
    assert len(cals) == 2  # as predicted, and constant
