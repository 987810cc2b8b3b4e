"""Tensors in a file mapped into memory: their pages can be given back, and are read again when used."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor

_PAGE_OUT = 21  # MADV_PAGEOUT, Linux 5.4: nothing is lost, changed pages stay


def page_out(*tensors: Tensor) -> None:
    """Give the pages of memory-mapped tensors back to the system, which reads them again when used.

    Nothing happens to a tensor that no file lies behind, and on systems other than Linux, which takes such
    pages back by itself when memory runs short.

    Args:
        tensors: contiguous in memory in some order of their axes, as weights and their transposes are.
    """
    if sys.platform != "linux":
        return
    files = _file_ranges()
    libc = ctypes.CDLL(None)
    for tensor in tensors:
        start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if not any(first <= start < last for first, last in files):
            continue
        # Whole pages only: the first and the last may hold a neighbour.
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, (start + size) // page * page
        if last > first:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _PAGE_OUT)


def _file_ranges() -> list[tuple[int, int]]:
    """Where files of tensors are mapped: first and last address."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.rstrip().endswith(".safetensors"):
            first, last = line.split(maxsplit=1)[0].split("-")
            found.append((int(first, 16), int(last, 16)))
    return found
