"README: short, its results are those of the tables, its example runs as it stands, its links lead somewhere."
import re

from biojepa.core import PATHS
from biojepa.report.readme import replace_block, results_block

README = (PATHS.root/"README.md").read_text()


def test_results_are_those_of_the_tables():
    assert replace_block(README, results_block()) == README, "run python -m biojepa.report.readme"


def test_at_most_900_words():
    assert len(README.split()) <= 900


def test_every_link_into_the_repository_leads_to_a_file():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(links) > 10
    for link in links: assert (PATHS.root/link).exists(), link


def test_the_example_runs_as_it_stands():
    "Nothing is trained for it."
    example, = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(example, names)
    out = names["out"]
    assert out.obs["condition"].tolist() == ["G010+ctrl", "G010+G026"]
    assert set(out.layers) == {"predicted", "delta", "sd", "control", "error"}
    assert {"reliability", "known", "leans_on"} <= set(out.obs)
