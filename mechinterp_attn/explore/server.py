"""Serve the explorer to this machine."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.explore.application import PROMPT, app, needed

if TYPE_CHECKING:
    from mechinterp_attn.model.attention_only import AttentionOnlyModel

HOST = "127.0.0.1"


def serve(
    model: AttentionOnlyModel,
    *,
    name: str = "model",
    prompt: str = PROMPT,
    port: int = 0,
    ready: Callable[[str], object] = print,
) -> None:
    """Serve the explorer of a model on this machine until Ctrl-C.

    It listens on the loopback address only, under an address with a key of its own each time.

    Args:
        model: the converted model, with a tokenizer.
        name: how the page calls the model.
        prompt: that stands in the box at first.
        port: where to listen; 0 takes a free one.
        ready: called with the address once it listens; by default it is printed.

    Raises:
        MechInterpError: the port is taken or out of range, the model has no tokenizer, or the extra
            ``explore`` is not installed.
    """
    web = needed()
    key = secrets.token_urlsafe(16)
    application = app(model, key, name=name, prompt=prompt)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise MechInterpError(f"port {port} of {HOST} cannot be used: {error}; give another") from error
        listening.listen()  # a browser that is quicker than the server waits
        ready(f"http://{HOST}:{listening.getsockname()[1]}/{key}/")
        config = web.uvicorn.Config(application, log_level="warning", access_log=False, lifespan="off")
        with suppress(KeyboardInterrupt):  # which is how one ends it
            web.uvicorn.Server(config).run(sockets=[listening])
