"""The page docs/detect.md, run from top to bottom as a reader would."""

import json
import re

from tests.conftest import ROOT


def test_every_example_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        json.dumps({"text": "It was the best of times, it was the worst of times. " * n}) for n in (2, 5)
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    page = (ROOT / "docs" / "detect.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, names)
    tests = [name for name in names if name.startswith("test_")]
    assert tests == ["test_the_model_keeps_its_induction_circuit"]
    names[tests[0]]()
    assert names["found"].found
    assert len(names["scores"].passages("L0N68")) == 10
