"""Every row of the benchmark can be measured.

1. Each form makes a step of each stage, and the forms give one loss.
2. Every case is expressed beside a plain one.
3. A case is measured in a process of its own, which says what the same process would."""
import pytest

from biojepa.report.benchmark import all_cases, measure_alone, run_cases
from biojepa.report.speed import Case, measure, training_step


@pytest.mark.parametrize("stage", ["pretrain", "dynamics"])
def test_forms_of_the_laptop_step_have_one_loss(stage):
    cases = [Case(stage, "laptop", .4, form, "fp32", 4, "cpu") for form in ("plain", "naive", "collapsed")]
    losses = [training_step(case)().item() for case in cases]
    assert losses == pytest.approx([losses[0]]*3, rel=1e-4)


@pytest.mark.parametrize("device, n", [("cpu", 32), ("cuda", 28)])
def test_every_case_is_expressed_beside_a_plain_one(device, n):
    cases = all_cases(device)
    assert len(cases) == len(set(cases)) == n
    plain = [c for c in cases if c.form == "plain" and c.precision == "fp32"]
    assert {(c.stage, c.size) for c in cases} == {(c.stage, c.size) for c in plain}


def test_ratios_of_equal_measurements_are_one():
    same = dict(seconds=2., gflop=1., memory_mb=100., loss=0.)
    table = run_cases(all_cases("cpu"), lambda case: case._asdict() | same)
    for ratio in (table.over_plain, table.over_plain_kept, table.arithmetic, table.memory_share):
        assert len(ratio) == len(table) and (ratio == 1).all()


def test_a_case_is_measured_in_a_process_of_its_own():
    case = Case("pretrain", "smoke", .4, "collapsed", "fp32", 2, "cpu")
    alone, here = measure_alone(case, 1), measure(case, 1)
    assert alone["loss"] == pytest.approx(here["loss"], rel=1e-4) and alone["gflop"] == here["gflop"]
    with pytest.raises(RuntimeError, match="the process ended with"):
        measure_alone(case._replace(size="huge"), 1)
