"""Writing files and folders: whole or not at all, and never in place of something that is not a file.

Everything the package writes goes through here. A file is written under a temporary name beside its
target and then renamed over it, so that a reader sees either the old file or the new one, and a write
that fails (full disk, interrupted, killed) leaves the old one as it was. Symbolic links are followed and
stay links, permissions are kept, and a pipe, a device or ``/dev/stdout`` is written to, not replaced.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from mechinterp_attn.core.errors import MechInterpError

if TYPE_CHECKING:
    from pandas import DataFrame

Writer = Callable[[Path], Any]
_OPEN_FILE = re.compile(r"/dev/std(in|out|err)|/(?:dev|proc/self)/fd/(\d+)")
# What makes a spreadsheet take a text for a formula; full-width forms count in East Asian settings.
_RUN = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_STANDARD = {"in": 0, "out": 1, "err": 2}


def write_file(path: str | os.PathLike[str], write: Writer) -> Path:
    """Write a file, whole or not at all.

    Args:
        path: the target. An existing file is replaced and its permissions are kept; a symbolic link is
            followed; a pipe, a device or ``/dev/stdout`` is written to.
        write: fills the file whose path it is given (a temporary one).

    Returns:
        ``path``.

    Raises:
        MechInterpError: the folder is missing or read-only, the name is too long, the target is a
            folder or a read-only file, or the disk is full. The old file is unchanged then.
    """
    path = check_writable(path)
    with _explained(path):
        if is_stream(path):
            _write_through(path, write)
        else:
            _replace(_resolved(path), write)
    return path


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """``write_file`` with a text, in UTF-8."""
    return write_file(path, lambda file: file.write_bytes(text.encode("utf-8")))


def write_csv(path: str | os.PathLike[str], table: DataFrame) -> Path:
    """``write_file`` with a table as comma-separated values, safe to open in a spreadsheet.

    A text that a spreadsheet would run as a formula (one that begins with ``=``, ``+``, ``-``, ``@``, a
    tab or a line break) gets an apostrophe in front. Numbers are left as they are.
    """

    def inert(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(_RUN) else value

    plain = table.map(inert).rename(columns=inert)
    text = plain.to_csv(index=False)
    if "\r" in text:  # a line break to most readers, but not to the writer, which leaves it unquoted
        text = plain.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)
    return write_text(path, text)


def write_folder(folder: str | os.PathLike[str], files: Mapping[str, Writer]) -> Path:
    """Write several files of a folder, all of them or none.

    The files are made in a new folder beside the target, which then takes the target's place in one
    step: no reader finds some old and some new files. Files of the old folder with other names are kept.
    A folder that cannot be moved (a mount point, the working directory, one whose parent is read-only)
    gets its new files one after the other instead, in the order given.

    Args:
        folder: the target; made if only its last part is missing.
        files: what fills each file, by name. They are called in order, so a later one can read the
            files before it, which stand beside its own.

    Returns:
        ``folder``.

    Raises:
        MechInterpError: as for ``write_file``.
    """
    folder = Path(folder)
    with _explained(folder):
        target = _check_folder(folder)
        new = _hidden(target)
        try:
            new.mkdir()
        except PermissionError:
            if not target.is_dir():
                raise
            new = _hidden(target / "any")
            new.mkdir()
        try:
            for name, write in files.items():
                write(new / name)
                _flush(new / name)
                _make_like(new / name, target / name)
            if not target.exists():
                new.rename(target)
            elif not _take_place(new, target):
                if new.parent != target:  # on the target's own disk, so that what follows needs no space
                    new = Path(shutil.move(new, _hidden(target / "any")))
                for name in files:
                    (new / name).replace(_resolved(target / name))
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return folder


def check_writable(path: str | os.PathLike[str]) -> Path:
    """The path, if a file can be written there as far as one can tell beforehand.

    Raises:
        MechInterpError: says what is in the way.
    """
    path = Path(path)
    with _explained(path):
        if is_stream(path):
            return path
        target = _resolved(path)
        if target.is_dir():
            raise MechInterpError(f"{path} is a folder; give the name of a file, such as {path / 'out'}")
        if not target.parent.is_dir():
            raise MechInterpError(
                f"cannot write {path}: the folder {target.parent} does not exist; make it first"
            )
        with contextlib.suppress(FileNotFoundError):
            target.stat()  # an over-long name fails here
            if not os.access(target, os.W_OK):
                raise MechInterpError(f"cannot write {path}: the file is read-only; choose another name")
        if not os.access(target.parent, os.W_OK):
            raise MechInterpError(
                f"cannot write {path}: the folder {target.parent} is read-only; choose another"
            )
    return path


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether this is a pipe, a device, a socket, or an open file of ours (``/dev/stdout``)."""
    if _open_file(path):
        return True
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _check_folder(folder: Path) -> Path:
    target = _resolved(folder)
    if target.exists() and not target.is_dir():
        raise MechInterpError(f"{folder} is a file; give a folder")
    if not target.parent.is_dir():
        raise MechInterpError(f"the folder {target.parent} does not exist; make it first")
    if not os.access(target if target.is_dir() else target.parent, os.W_OK):
        raise MechInterpError(f"cannot write {folder}: it is read-only; choose another folder")
    return target


def _open_file(path: str | os.PathLike[str]) -> re.Match[str] | None:
    """Whether a path leads, by any links, to one of our own open files."""
    here = Path(path).absolute()
    for _ in range(40):  # links that a system follows at most
        if found := _OPEN_FILE.fullmatch(os.path.normpath(here)):
            return found
        if not here.is_symlink():
            return None
        here = here.parent / here.readlink()
    return None


def _write_through(path: Path, write: Writer) -> None:
    """Writers may seek, so they fill a file first; its content then goes where it belongs."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "content"
        write(made)
        if own := _open_file(path):  # not opened anew: one that is appended to would be cut short
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sink = os.fdopen(os.dup(_STANDARD[own[1]] if own[1] else int(own[2])), "wb")
        else:
            sink = path.open("wb")
        with made.open("rb") as source, sink:
            shutil.copyfileobj(source, sink)


def _replace(target: Path, write: Writer) -> None:
    """Fill a temporary file beside ``target`` and rename it over ``target``."""
    temporary = _hidden(target)
    # Made the way other programs make files, so that a new one has the permissions the user expects.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = temporary.stat().st_mode
    try:
        write(temporary)
        _flush(temporary)
        temporary.chmod(stat.S_IMODE(mode))  # some writers make the file anew, with their own
        _make_like(temporary, target)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _hidden(target: Path) -> Path:
    """A free name beside a target; a short one, since the target's own may be as long as names can be."""
    return target.parent / f".{secrets.token_hex(8)}.tmp"


def _flush(file: Path) -> None:
    """Onto the disk: some file systems notice only then that they are full."""
    handle = os.open(file, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_like(new: Path, old: Path) -> None:
    """Permissions and owner of what is replaced, if there is something."""
    try:
        there = old.stat()
    except FileNotFoundError:
        return
    if hasattr(os, "chown"):
        with contextlib.suppress(OSError):  # only root may give a file away
            os.chown(new, there.st_uid, there.st_gid)
    new.chmod(stat.S_IMODE(there.st_mode))


def _take_place(new: Path, target: Path) -> bool:
    """Exchange a folder for a new one and keep what only the old one holds; False if it cannot be moved."""
    here = Path.cwd()
    links = any((target / file.name).is_symlink() for file in new.iterdir())
    if links or new.parent == target or here == target or target in here.parents:
        return False
    made = {file.name for file in new.iterdir()}
    _make_like(new, target)
    if not _exchange(new, target):
        return False
    for other in new.iterdir():  # now the old folder
        if other.name not in made:
            other.rename(target / other.name)
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders, in one step where the system can; False if they cannot be moved."""
    library: Any = ctypes.CDLL(None) if os.name == "posix" else None
    names = os.fsencode(one), os.fsencode(other)
    swapped = 1
    if hasattr(library, "renameat2"):  # Linux; -100 stands for paths as they are, 2 for an exchange
        swapped = library.renameat2(-100, names[0], -100, names[1], 2)
    elif hasattr(library, "renamex_np"):  # macOS
        swapped = library.renamex_np(*names, 2)
    if swapped == 0:
        return True
    aside = _hidden(other)
    try:
        other.rename(aside)
    except OSError:
        return False
    try:
        one.rename(other)
    except BaseException:
        aside.rename(other)
        raise
    aside.rename(one)
    return True


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError as error:  # a circle of links, until Python 3.13
        raise MechInterpError(f"cannot write {path}: its symbolic links lead back to themselves") from error


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What the system has against it, in a line that names the target."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise MechInterpError(f"cannot write {path}: {why}") from error
