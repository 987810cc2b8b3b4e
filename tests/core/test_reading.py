"""Text, JSON and YAML from outside: read, or refused with a reason; a byte order mark is no text."""

import json
import os

import pytest

import mechinterp_attn as mia
from mechinterp_attn.core.reading import parse_json, parse_yaml, read_json, read_text


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2.5, -3e2, "b", null, true, {"c": {}}], "d": "\\u2028"}', "[]", " 3 ", '"x"']
)
def test_json_is_what_the_library_reads(text):
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        ("[NaN]", "NaN is no JSON number"),
        ("[-Infinity]", "-Infinity is no JSON number"),
        ("[1e400]", "1e400 is no JSON number"),
        ("1" * 50, "a number of 50 digits"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
    ],
)
def test_what_is_no_json_is_refused(text, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(mia.MechInterpError, match=rf"a\.json is not JSON: .*{reason}"):
        read_json(tmp_path / "a.json")


def test_a_byte_order_mark_is_no_text(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_text(file) == "[1]"
    assert read_json(file) == [1]


def test_what_cannot_be_read_is_said(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    os.mkfifo(tmp_path / "pipe")  # would be waited for
    for name, reason in (
        ("latin", "it is not UTF-8 text"),
        ("pipe", "not a regular file"),
        (".", "not a regular file"),
        ("none", "No such file"),
        ("x" * 300, "File name too long"),
        ("nu\0l", "null"),
    ):
        with pytest.raises(mia.MechInterpError, match=reason):
            read_text(f"{tmp_path}/{name}")


def test_yaml_is_plain_data():
    assert parse_yaml("a: {b: [1, 2.5, x]}\nc: yes") == {"a": {"b": [1, 2.5, "x"]}, "c": True}


def test_foreign_files_of_circuits_and_tasks_are_refused_by_name(tmp_path):
    file = tmp_path / "circuit.json"
    for text, reason in (
        ("[]", "expected an object"),
        ('{"heads": ["L0H0"], "edges": [["L0H0", "L1H0"]]}', r"edges\.0"),
        ('{"heads": [1], "edges": []}', r"heads\.0=1, expected a valid string"),
        ('{"heads": [], "heads": [], "edges": []}', "'heads' stands twice"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(mia.MechInterpError, match=reason):
            mia.causal.Circuit.load(file)
    for text, reason in (
        ('{"clean": "a", "clean": "b"}', "line 1 is not JSON: the key 'clean' stands twice"),
        ("\n[1]", r"line 2 is \[1\]; expected an object"),
        ("[" * 100_000, "line 1 is not JSON: it is nested too deeply"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(mia.MechInterpError, match=reason):
            mia.Task.load(file)
    with pytest.raises(mia.MechInterpError, match="No such file"):
        mia.Task.load(tmp_path / "none")
    file.write_text('\ufeff{"clean": "a line\u2028separator", "answer": "b"}', encoding="utf-8")
    assert list(mia.Task.load(file).clean) == ["a line\u2028separator"]
