"""The state of long work in a file, so that it can be interrupted, killed, and taken up again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.files import is_stream, write_file

if TYPE_CHECKING:
    from torch import Tensor

EVERY = 15.0  # seconds between two writes of a state that may be written at any time


class SavedState:
    """A safetensors file that holds how far some work has come, and whose work it is.

    Args:
        path: the file; it need not exist.
        what: the kind of work, such as "a pass over a corpus".
        option: the argument that named the file, for error messages.
        about: everything the result depends on (the fingerprints of weights among it) by name, as JSON
            has it. A file about anything else is refused.

    Raises:
        MechInterpError: the path is a pipe or a device, from which no state can be read back.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, what: str, option: str, about: Mapping[str, Any]
    ) -> None:
        self.path, self.what, self.option = Path(path), what, option
        self.about = json.loads(json.dumps(about))
        self.written = time.monotonic()
        if is_stream(self.path):
            raise MechInterpError(f"{option}={os.fspath(path)!r} is not a file that can be read back")

    def load(self) -> tuple[dict[str, Tensor], Any] | None:
        """The tensors and the progress that ``store`` wrote last; None if there is no file yet.

        Raises:
            MechInterpError: the file is damaged, of another kind, or about other work.
        """
        from safetensors import safe_open

        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            what, found, progress = state["what"], dict(state["about"]), state["progress"]
        except Exception as error:  # whatever stands in a file that is not ours
            raise self.refusal(f"it is not {self.what}: {error}") from error
        if what != self.what:
            raise self.refusal(f"it holds {what}, not {self.what}")
        differs = [
            f"{name}: {found.get(name)!r} there, {self.about.get(name)!r} here"
            for name in sorted({*found, *self.about})
            if found.get(name) != self.about.get(name)
        ]
        if differs:
            raise self.refusal(f"it belongs to other work ({'; '.join(differs)})")
        return tensors, progress

    def store(self, tensors: Mapping[str, Tensor], progress: Any, *, now: bool = True) -> None:
        """Write the state, whole or not at all.

        Args:
            tensors: what was found so far.
            progress: how far that is, as JSON has it.
            now: write in any case; otherwise only if the last write is ``EVERY`` seconds ago.
        """
        from safetensors.torch import save_file

        if not now and time.monotonic() - self.written < EVERY:
            return
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        state = json.dumps({"what": self.what, "about": self.about, "progress": progress})
        write_file(self.path, lambda path: save_file(whole, path, metadata={"state": state}))
        self.written = time.monotonic()

    def refusal(self, why: str) -> MechInterpError:
        """An error that says why the file cannot be gone on with, and what to do."""
        return MechInterpError(
            f"cannot continue from {self.path}: {why}; give another file for {self.option}=, or remove it"
        )
