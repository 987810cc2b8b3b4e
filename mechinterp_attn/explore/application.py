"""The explorer as a web application: six addresses behind a key, for this machine only.

There is no address that names a file, a model or code: a prompt is text for the tokenizer, and heads are
labels. The key in the address keeps other pages and users of the machine out; requests under another host
name (DNS rebinding) are refused, and so are bodies that are larger than a prompt can be.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.explore.asked import Asked, AskedEdits
from mechinterp_attn.explore.page import page
from mechinterp_attn.explore.session import Session

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from mechinterp_attn.model.attention_only import AttentionOnlyModel

MOST_BYTES = 2**20  # of a question
PROMPT = "It was the best of times, it was the worst of times, it was the"
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def app(model: AttentionOnlyModel, key: str, *, name: str = "model", prompt: str = PROMPT) -> Starlette:
    """The application, for any ASGI server that listens on this machine only.

    Args:
        model: the converted model; requests run on it one at a time.
        key: the first part of every address.
        name: how pages call the model.
        prompt: that stands in the box at first.

    Raises:
        MechInterpError: the model has no tokenizer, or the extra ``explore`` is not installed.
    """
    starlette = needed()
    session = Session(model, name)
    text, policy = page(name, model.n_heads, prompt)

    async def start(request: Request) -> Response:
        headers = HEADERS | {"Content-Security-Policy": policy}
        return starlette.HTMLResponse(text, headers=headers)

    async def story(request: Request) -> Response:
        found = session.story(request.path_params["story"])
        if found is None:
            return starlette.PlainTextResponse("This story is no longer kept.", 404, headers=HEADERS)
        # in a frame without an origin: what stands in the report can ask the explorer for nothing
        policy = "sandbox allow-scripts allow-downloads allow-popups; frame-ancestors 'self'"
        return starlette.HTMLResponse(found, headers=HEADERS | {"Content-Security-Policy": policy})

    def answer(kind: type[BaseModel], ask: Callable[[Any], Any]) -> Callable[..., Any]:
        async def endpoint(request: Request) -> Response:
            try:
                asked = kind.model_validate(json.loads(await _body(request)))
                found = await starlette.run_in_threadpool(ask, asked)
            except (MechInterpError, ValidationError, ValueError) as error:
                return starlette.JSONResponse({"error": _said(error)}, 400, headers=HEADERS)
            except Exception:
                traceback.print_exc()
                said = "this is a bug; the terminal says more"
                return starlette.JSONResponse({"error": said}, 500, headers=HEADERS)
            return starlette.JSONResponse(found, headers=HEADERS)

        return endpoint

    routes = [
        starlette.Route(f"/{key}/", start),
        starlette.Route(f"/{key}/predict", answer(Asked, session.predict), methods=["POST"]),
        starlette.Route(f"/{key}/edit", answer(AskedEdits, session.edit), methods=["POST"]),
        starlette.Route(f"/{key}/story", answer(Asked, session.write_story), methods=["POST"]),
        starlette.Route(f"/{key}/story/{{story}}", story),
    ]
    own = starlette.Middleware(starlette.TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    return starlette.Starlette(routes=routes, middleware=[own])


def needed() -> Any:
    """What the explorer takes of Starlette, which is not installed by default.

    Raises:
        MechInterpError: it is not there; the message says which extra brings it.
    """
    try:
        from mechinterp_attn.explore import web
    except ImportError as error:
        raise MechInterpError(
            f"the explorer needs {error.name}: pip install 'mechinterp_attn[explore]'"
        ) from error
    return web


async def _body(request: Request) -> bytes:
    """The body, as far as it is one: larger ones are not read to their end."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise MechInterpError(f"the question is larger than {MOST_BYTES:,} bytes")
    return body


def _said(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'the question'}: {one['msg']}" for one in error.errors()
        )
    return str(error) if isinstance(error, MechInterpError) else "the question is not JSON"
