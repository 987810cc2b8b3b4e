"""Pages of tensors in mapped files."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mechinterp_attn.core.mapped import page_out


def resident_of_files() -> int:
    return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts pages and gives them back")
def test_pages_are_given_back_and_read_again(tmp_path):
    given = torch.arange(2.0**22).view(2048, 2048)  # 16 MiB
    save_file({"W": given}, tmp_path / "model.safetensors")
    mapped = load_file(tmp_path / "model.safetensors")["W"]
    mapped[0, 0] = 7  # a page that is not the file's any more
    assert torch.equal(mapped.flatten()[1:], given.flatten()[1:])
    full = resident_of_files()
    page_out(mapped.T)
    assert full - resident_of_files() > 12 * 1024, "most of 16 MiB are no longer resident"
    given[0, 0] = 7
    assert torch.equal(mapped, given)


def test_other_tensors_are_left_alone():
    x = torch.ones(100_000)
    page_out(x, x[:0])
    assert bool((x == 1).all())
