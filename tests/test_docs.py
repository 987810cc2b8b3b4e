"""The documentation holds together: the words of the report, the tables of the benchmarks, the links."""

import csv
import re
import sys
from pathlib import Path

from mechinterp_attn.view.report.sections_glossary import GLOSSARY

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def test_every_word_of_the_report_is_in_the_glossary():
    """Each has an anchor that a page can link to; each names a page that is there."""
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    terms = set(re.findall(r"^(\w[\w -]*)$", text, re.M))
    assert set(GLOSSARY) <= terms
    assert {page for _, page, _ in GLOSSARY.values()} <= {path.stem for path in DOCS.glob("*.md")}


def test_every_table_says_how_it_was_made():
    """By a script that is here, and on no named machine."""
    runs = {
        row["table"]: row
        for row in csv.DictReader((DOCS / "benchmarks" / "runs.csv").read_text().splitlines())
    }
    tables = {path.stem for path in (DOCS / "benchmarks").glob("*.csv")} - {"runs"}
    assert tables == set(runs)
    for row in runs.values():
        script = row["command"].split()[1]
        assert (ROOT / script).is_file(), script
        assert not re.search(r"(^|\s)/", row["command"]), row["command"]


def test_every_page_is_reached_from_the_front():
    front = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^(\w+)$", front, re.M))
    assert {path.stem for path in DOCS.glob("*.md")} - {"index"} <= listed


def test_a_dead_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    from check_links import dead_links

    (tmp_path / "a.html").write_text('<a id="here"></a><a href="b.html#there">b</a><a href="#here">a</a>')
    (tmp_path / "b.html").write_text(
        '<h1 id="there">b</h1><img src="no.png"><a href="https://x.invalid">x</a>'
    )
    assert dead_links(tmp_path) == ["b.html: no.png"]
    (tmp_path / "b.html").write_text("<h1>b</h1>")
    assert dead_links(tmp_path) == ["a.html: b.html#there"]
