"The documentation site: every page built, no broken link, nothing fetched, every public name documented."
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from biojepa.core import PATHS
from biojepa.report.site import link_names, mathml, write_pages


class Links(HTMLParser):
    def __init__(self): super().__init__(); self.found, self.ids, self.fetched = [], set(), []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.ids.add(attrs["id"])
        if tag in ("script", "link", "img", "iframe"):
            self.fetched.append(attrs.get("src") or attrs.get("href") or "")
        if tag == "a" and attrs.get("href"): self.found.append(attrs["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    config = write_pages(out=folder/"_proc")
    config.write_text(config.read_text().replace("../mkdocs.yml", str(PATHS.root/"mkdocs.yml")))
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "-f",
                           str(config)],
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]  # -q would silence warnings and with them --strict
    return folder/"_docs"


def parsed(path):
    parser = Links()
    parser.feed(path.read_text())
    return parser


def test_every_notebook_has_a_page_and_no_link_or_picture_is_broken(site):
    pages = {p.relative_to(site).as_posix(): parsed(p) for p in site.rglob("*.html")}
    assert {
        n.relative_to(PATHS.nbs).with_suffix(".html").as_posix() for n in PATHS.nbs.rglob("[0-9]*.ipynb")
    } | {"index.html", "map.html"} <= set(pages)
    links = 0
    for name, page in pages.items():
        if name == "404.html": continue  # its links start from the site's root, wherever that is
        assert not [f for f in page.fetched if re.match(r"(https?:)?//", f)], f"{name} fetches from the network"
        assert all(((site/name).parent/f.split("?")[0].split("#")[0]).exists() for f in page.fetched
                   if not f.startswith("data:"))
        for href in page.found:
            if re.match(r"https?:|mailto:", href): continue
            file, _, anchor = href.partition("#")
            links += 1
            target = ((site/name).parent/file).resolve() if file else site/name
            assert target.exists(), f"{name} links to {href}"
            shown = target.relative_to(site.resolve() if file else site).as_posix()
            if anchor and shown in pages: assert anchor in pages[shown].ids, f"{name} links to {href}"
    assert links > 1000


def test_search_finds_an_exported_name_with_its_comments(site):
    found = [
        d for d in json.loads((site/"search"/"search_index.json").read_text())["docs"]
        if d["title"] == "run_stages"
    ]
    assert [d["location"] for d in found] == ["4_training/08_run.html#run_stages"
                                              ] and "where run folders live" in found[0]["text"]


def test_public_names_are_on_the_page_of_their_notebook(site):
    from biojepa.model import attention
    text = (site/"3_model/01_attention.html").read_text()
    classes = [n for n in attention.__all__ if callable(getattr(attention, n))]
    assert classes and all(f'id="{n.lower()}"' in text for n in classes)
    assert str(PATHS.root) not in re.sub(r"<script.*?</script>", "", text)


def test_no_page_shows_a_path_of_one_machine_or_raw_latex(site):
    for path in site.rglob("*.html"):
        assert str(PATHS.root) + "/" not in path.read_text(), path.name
        assert "$$" not in re.sub(r"<(script|code|pre).*?</\1>", "", path.read_text(), flags=re.S), path.name


def test_formulas_and_names_leave_code_alone():
    assert mathml("`$a$` costs 5 $ or 6 $") == "`$a$` costs 5 $ or 6 $"
    assert mathml("```\n$a$\n```") == "```\n$a$\n```"
    assert mathml("x $a_i$ y").count("<math") == 1
    assert link_names("[`fit`](x.md) `fit`", {"fit": "40.md#fit"}, "1") == "[`fit`](x.md) [`fit`](40.md#fit)"
