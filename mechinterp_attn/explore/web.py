"""The names that the explorer takes from its optional libraries, in one place."""

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.routing import Route

__all__ = [
    "HTMLResponse",
    "JSONResponse",
    "Middleware",
    "PlainTextResponse",
    "Route",
    "Starlette",
    "TrustedHostMiddleware",
    "run_in_threadpool",
    "uvicorn",
]
