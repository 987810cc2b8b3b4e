"""The fingerprint changes with whatever changes, and with nothing else."""

from dataclasses import dataclass

import pytest
import torch

from mechinterp_attn.core import fingerprint as module
from mechinterp_attn.core.fingerprint import fingerprint


@dataclass(frozen=True)
class Options:
    top: int = 3
    name: str = "a"


def different():
    x = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4)
    flipped = x.clone()
    flipped[0, 0, 0] = 5e-324  # the last bit of a zero
    swapped = x[[1, 0]]
    return [
        (x,), (flipped,), (swapped,), (x.flatten(),), (x.float(),), (x.mT,), (-x,), (x, x), (x[:1], x[1:]),
        ("ab", "c"), ("a", "bc"), ("abc",), (b"abc",), (["a"], "b"), (["a", "b"],), ([],), (None,), (0,),
        (0.0,), (-0.0,), (False,), ("0",), ({"a": 1},), ({"a": 2},), ({"b": 1},), (Options(),),
        (Options(top=4),), ({"top": 3, "name": "a"},),
    ]  # fmt: skip


def test_no_two_different_things_have_one_fingerprint():
    marks = [fingerprint(*parts) for parts in different()]
    assert len(set(marks)) == len(marks)
    assert all(len(mark) == 32 for mark in marks)


def test_neither_layout_nor_pieces_matter(monkeypatch):
    x = torch.randn(7, 5, dtype=torch.float64)
    mark = fingerprint(x)
    assert fingerprint(x.T.contiguous().T) == mark
    assert fingerprint(torch.cat([x, x])[7:]) == mark
    monkeypatch.setattr(module, "AT_ONCE", 24)
    assert fingerprint(x) == mark
    assert fingerprint(x.bfloat16()) != fingerprint(x.half())
    assert fingerprint(x.requires_grad_()) == mark


def test_what_cannot_be_told_is_refused():
    with pytest.raises(TypeError, match="no fingerprint of a object"):
        fingerprint({"a": [object()]})
