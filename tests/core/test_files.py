"""Files are written whole or not at all, and only where a file stands or could stand."""

import os
import resource
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd
import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core import files
from mechinterp_attn.core.errors import CheckpointError, MechInterpError
from tests.conftest import tiny_bridge


@contextmanager
def small_disk(n_bytes):
    """No file may grow beyond this: what a full disk looks like to a program."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def as_nobody():
    """Root may write anywhere; read-only folders say nothing to it."""
    root = os.getuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)


@pytest.fixture
def open_folder():
    """A folder that anyone may look into, unlike ``tmp_path``."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def left_behind(folder):
    return [file.name for file in folder.iterdir() if file.name.endswith(".tmp")]


def test_a_new_file_has_the_permissions_of_any_new_file_and_an_old_one_keeps_its_own(tmp_path):
    before = os.umask(0o027)
    try:
        new = files.write_text(tmp_path / "new", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE(new.stat().st_mode) == 0o640
    new.chmod(0o604)
    files.write_text(new, "other text")
    assert new.read_text() == "other text"
    assert stat.S_IMODE(new.stat().st_mode) == 0o604
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link_and_its_target_is_written(tmp_path, exists):
    (tmp_path / "deep").mkdir()
    target, link = tmp_path / "deep" / "target", tmp_path / "link"
    if exists:
        target.write_text("old")
    link.symlink_to(Path("deep") / "target")
    files.write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(MechInterpError, match="circle"):
        files.write_text(circle, "new")


def test_a_pipe_is_written_through(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    files.write_text(pipe, "through " * 20_000)  # more than a pipe holds
    reader.join()
    assert read == ["through " * 20_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_is_written_to_not_replaced(tmp_path):
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    files.write_text(link, "away")
    files.write_text("/dev/null", "away")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(MechInterpError, match="cannot write /dev/full: No space left on device"):
        files.write_text("/dev/full", "nowhere")


OUT = """
from mechinterp_attn.core.files import write_text
print("before")
write_text({path!r}, "table\\n")
print("after")
"""


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_may_be_a_file_that_is_appended_to(tmp_path, path):
    """``command --csv /dev/stdout >> file``: opened anew, the file would lose what it holds."""
    out = tmp_path / "out"
    out.write_text("there\n")
    with out.open("a") as sink:
        subprocess.run([sys.executable, "-c", OUT.format(path=path)], stdout=sink, check=True)
    assert out.read_text() == "there\nbefore\ntable\nafter\n"


@pytest.mark.parametrize("write", ["text", "tensors"])
def test_a_full_disk_leaves_the_old_file(tmp_path, write):
    from safetensors.torch import save_file

    file = files.write_text(tmp_path / "file", "old")
    writers = {
        "text": lambda path: path.write_text("new" * 1000),
        "tensors": lambda path: save_file({"x": torch.zeros(1000)}, path),
    }
    with small_disk(1000), pytest.raises(MechInterpError, match=r"cannot write .*[Ff]ile too large"):
        files.write_file(file, writers[write])
    assert file.read_text() == "old"
    assert left_behind(tmp_path) == []


def test_what_is_in_the_way_is_said(tmp_path, open_folder):
    with pytest.raises(MechInterpError, match=r"cannot write .*the folder .*nowhere does not exist"):
        files.write_text(tmp_path / "nowhere" / "file", "text")
    with pytest.raises(MechInterpError, match="is a folder; give the name of a file"):
        files.write_text(tmp_path, "text")
    with pytest.raises(MechInterpError, match=r"cannot write .*File name too long"):
        files.write_text(tmp_path / ("x" * 300), "text")
    longest = files.write_text(tmp_path / ("x" * 255), "text")  # the temporary name must be shorter
    assert longest.read_text() == "text"
    file = files.write_text(open_folder / "mine", "old")
    file.chmod(0o444)
    with as_nobody(), pytest.raises(MechInterpError, match="the file is read-only"):
        files.write_text(file, "new")
    open_folder.chmod(0o755)
    with as_nobody(), pytest.raises(MechInterpError, match=r"the folder .* is read-only"):
        files.write_text(open_folder / "other", "new")
    assert file.read_text() == "old"


def test_a_writer_that_fails_changes_nothing(tmp_path):
    file = files.write_text(tmp_path / "file", "old")

    def stopped(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_file(file, stopped)
    assert file.read_text() == "old"
    assert left_behind(tmp_path) == []


def texts(**content):
    return {name: lambda path, text=text: path.write_text(text) for name, text in content.items()}


def content(folder):
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def by_exchange(folder, monkeypatch):
    pass


def without_the_system_call(folder, monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda name: object())


def in_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)


def where_no_folder_can_be_moved(folder, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)


WAYS = [by_exchange, without_the_system_call, in_the_working_directory, where_no_folder_can_be_moved]


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, way):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o750)
    (folder / "a").write_text("old")
    (folder / "notes").write_text("mine")
    (folder / "a").chmod(0o600)
    way(folder, monkeypatch)
    files.write_folder(folder, texts(a="new", b="new"))
    assert content(folder) == {"a": "new", "b": "new", "notes": "mine"}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o600
    with small_disk(1000), pytest.raises(MechInterpError, match=r"cannot write .*File too large"):
        files.write_folder(folder, texts(a="newer", b="newer" * 1000))
    assert content(folder) == {"a": "new", "b": "new", "notes": "mine"}
    assert left_behind(tmp_path) == []


def test_a_folder_in_one_that_is_read_only(open_folder):
    folder = open_folder / "folder"
    folder.mkdir()
    folder.chmod(0o777)
    open_folder.chmod(0o755)
    with as_nobody():
        files.write_folder(folder, texts(a="new", b="new"))
        with pytest.raises(MechInterpError, match="cannot write"):
            files.write_folder(open_folder / "another", texts(a="new"))
    assert content(folder) == {"a": "new", "b": "new"}
    folder.chmod(0o755)
    with as_nobody(), pytest.raises(MechInterpError, match="it is read-only"):
        files.write_folder(folder, texts(a="newer"))
    assert content(folder) == {"a": "new", "b": "new"}


def test_links_in_and_to_a_folder_stay(tmp_path):
    (tmp_path / "elsewhere").write_text("old")
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to("real")
    (real / "a").symlink_to("../elsewhere")
    files.write_folder(link, texts(a="new", b="new"))
    assert link.is_symlink()
    assert (real / "a").is_symlink()
    assert content(real) == {"a": "new", "b": "new"}
    assert (tmp_path / "elsewhere").read_text() == "new"


def test_no_reader_ever_sees_a_mixture(tmp_path):
    """Two models saved over each other again and again, while someone lists what is there."""
    folder, seen, stop = tmp_path / "folder", set(), threading.Event()
    files.write_folder(folder, texts(a="0", b="0"))

    def look():
        while not stop.is_set():
            handle = os.open(folder, os.O_RDONLY)  # of one folder, whatever stands there next
            with suppress(FileNotFoundError):  # this one has been replaced and is being removed
                a, b = (os.open(name, os.O_RDONLY, dir_fd=handle) for name in "ab")
                seen.add((os.read(a, 9), os.read(b, 9)))
                os.close(a)
                os.close(b)
            os.close(handle)

    reader = threading.Thread(target=look)
    reader.start()
    for i in range(60):
        files.write_folder(folder, texts(a=str(i), b=str(i)))
    stop.set()
    reader.join()
    assert len(seen) > 1
    assert all(a == b for a, b in seen)


def test_saving_over_a_model_gives_the_old_one_or_the_new_one(tmp_path):
    model, other = (mia.convert(tiny_bridge(seed=seed)) for seed in (0, 1))
    folder = tmp_path / "model"
    model.save(folder)
    with small_disk(3000), pytest.raises(MechInterpError, match="cannot write"):
        other.save(folder)
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(mia.load(folder)(tokens), model(tokens))  # laid out otherwise in memory
    other.save(folder)
    torch.testing.assert_close(mia.load(folder)(tokens), other(tokens))
    (folder / "tokenizer.json").write_text("{}")  # of nobody that was saved here
    assert mia.load(folder).tokenizer is None
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("1e-05", "2e-05"))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged or not the file that was saved"):
        mia.load(folder)


def test_spreadsheets_run_no_cell(tmp_path):
    cells = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1", " =1", "plain", 'say "=1"', None]
    table = pd.DataFrame({"token": cells, "value": [-1.5] * len(cells), "=head": ["L0H1"] * len(cells)})
    again = pd.read_csv(files.write_csv(tmp_path / "table.csv", table), keep_default_na=False)
    assert list(again.columns) == ["token", "value", "'=head"]
    assert list(again["token"]) == [*(f"'{cell}" for cell in cells[:7]), *cells[7:10], ""]
    assert list(again["value"]) == [-1.5] * len(cells)  # a number stays a number
    assert list(table["token"])[:-1] == cells[:-1]
