"Every row of the benchmark can be measured: each preset, stage and form makes a step, and the forms give one loss."
import pytest

from biojepa.report.speed import Case, all_cases, run_cases, training_step


@pytest.mark.parametrize("stage", ["pretrain", "dynamics"])
def test_forms_of_the_laptop_step_have_one_loss(stage):
    losses = [
        training_step(Case(stage, "laptop", .4, form, "fp32", 4, "cpu"))().item()
        for form in ("plain", "naive", "collapsed")
    ]
    assert losses == pytest.approx([losses[0]]*3, rel=1e-4)


def test_every_case_is_expressed_beside_a_plain_one():
    cases = all_cases("cpu")
    assert {(c.stage, c.size) for c in cases} == {(c.stage, c.size) for c in cases
                                                  if c.form == "plain" and c.precision == "fp32"}
    table = run_cases(cases, lambda case: dict(case._asdict(), seconds=2., gflop=1., memory_mb=100., loss=0.))
    for ratio in (table.over_plain, table.over_plain_kept, table.arithmetic, table.memory_share):
        assert len(ratio) == len(cases) and (ratio == 1).all()
