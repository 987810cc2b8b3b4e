"""A plugin of pytest: which functions each test calls, and how long it takes.

What a fixture calls counts for all tests of its file, since they share it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest


class Reach:
    """Watches the functions of some files.

    Args:
        package: the folder that the files are in.
        files: relative to it.
        out: where the JSON goes: ``{"calls": {test: [[file, function], ...]}, "seconds": {test: ...}}``.
    """

    def __init__(self, package: Path, files: list[str], out: Path):
        self.files = {str(package / file): file for file in files}
        self.out = out
        self.seen: set[tuple[str, str]] = set()
        self.calls: dict[str, set[tuple[str, str]]] = {}
        self.of_file: dict[str, set[tuple[str, str]]] = {}
        self.seconds: dict[str, float] = {}

    def _called(self, frame: FrameType, event: str, arg: Any) -> None:
        file = self.files.get(frame.f_code.co_filename)
        if file is not None:
            self.seen.add((file, frame.f_code.co_name))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        threading.settrace(self._called)
        sys.settrace(self._called)
        start = time.monotonic()
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)
            self.seconds[item.nodeid] = time.monotonic() - start

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        self.of_file.setdefault(item.nodeid.split("::")[0], set()).update(self.seen)
        self.seen = set()
        try:
            return (yield)
        finally:
            self.calls[item.nodeid] = self.seen
            self.seen = set()

    def pytest_sessionfinish(self) -> None:
        calls = {t: sorted(seen | self.of_file[t.split("::")[0]]) for t, seen in self.calls.items()}
        self.out.write_text(json.dumps({"calls": calls, "seconds": self.seconds}))
