"""The server of `prefab view`: addresses, and who may ask.

Threats: another page in the same browser, a name that resolves to this machine (DNS rebinding),
another user of this machine, and what is shown, which models wrote. So it listens on the loopback
interface only; it asks for a random token, which a cookie keeps; it answers only to its own name
and to requests that its own pages made; and a content security policy lets no script run but the
page's two files.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import orjson
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from prefab.factory import svg as charts
from prefab.factory.errors import ConfigError, PrefabError
from prefab.pipelines.view import texts
from prefab.pipelines.view.analysis import agreement, judges, training
from prefab.pipelines.view.constitution import constitution, download, edited
from prefab.pipelines.view.filters import OUTCOMES, SORTS
from prefab.pipelines.view.grid import preferences
from prefab.pipelines.view.label import label, say
from prefab.pipelines.view.pages import (
    Page,
    PageOf,
    Parameters,
    View,
    compare,
    run,
    runs,
)
from prefab.pipelines.view.preference import preference, raw_text
from prefab.pipelines.view.reader import FillingError

HERE = Path(__file__).parent
STATIC = {
    "icon.svg": "image/svg+xml",
    "view.css": "text/css",
    "view.js": "text/javascript",
    "htmx.min.js": "text/javascript",
}
MOST_BYTES = 2_000_000  # of a form
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
NAV = (
    ("runs", "Runs"),
    ("preferences", "Preferences"),
    ("agreement", "Agreement"),
    ("judges", "Judges"),
    ("constitution", "Constitution"),
    ("label", "Label"),
    ("training", "Training"),
)
PAGES: dict[str, PageOf] = {
    "runs": runs,
    "run": run,
    "compare": compare,
    "preferences": preferences,
    "preference": preference,
    "agreement": agreement,
    "judges": judges,
    "constitution": constitution,
    "label": label,
    "training": training,
}


class Gate:
    """Lets through what this server's own pages ask, with the token."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app, self.token, self.port = app, token, port
        self.cookie = f"prefab_view_{port}"
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
            await send(message)

        request = Request(scope)
        answer = self._refused(request.headers, request.method) or self._let_in(request)
        await (answer or self.app)(scope, receive, with_headers)

    def _refused(self, headers: Headers, method: str) -> Response | None:
        """A refusal of a foreign host or origin, or of a page that another page asks for."""
        if headers.get("host", "") not in self.hosts:
            return PlainTextResponse("this server has another name", 421)
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        own = origin in {f"http://{host}" for host in self.hosts}
        foreign = site in ("cross-site", "same-site")
        link = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}  # not in a frame
        followed = method == "GET" and all(headers.get(k) == v for k, v in link.items())
        if (origin is not None and not own) or (foreign and not followed):
            return PlainTextResponse("another page asked for this", 403)
        if method not in ("GET", "HEAD") and not own:
            return PlainTextResponse("only this server's own pages may change something", 403)
        return None

    def _let_in(self, request: Request) -> Response | None:
        """None for a request with the cookie. The token in an address becomes a cookie, so that it
        stands in no link.
        """
        given = request.query_params.get("token", "")
        if self._is_token(given) and request.method == "GET":
            rest = [(k, v) for k, v in request.query_params.multi_items() if k != "token"]
            path = request.url.path if re.fullmatch(r"/[a-z]*", request.url.path) else "/"
            answer = RedirectResponse(f"{path}?{urlencode(rest)}" if rest else path, 303)
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="lax", path="/")
            return answer
        if self._is_token(request.cookies.get(self.cookie, "")):
            return None
        return PlainTextResponse("open the address that `prefab view` printed", 403)

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.token.encode())


def environment() -> Environment:
    """The templates, which escape every text."""
    env = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "shown": texts.shown,
        "short": texts.short,
        "safe_text": texts.safe,
        "number": charts.number,
        "query": urlencode,
    }
    env.globals |= {
        "words_apart": texts.words_apart,
        "histogram": charts.histogram,
        "pbar": charts.probability_bar,
        "shares": charts.share_bar,
        "lines": charts.lines,
        "intervals": charts.intervals,
        "OUTCOMES": OUTCOMES,
        "SORTS": list(SORTS),
        "WORDS": {"a": "A preferred", "b": "B preferred", "tie": "tie", "unscored": "unscored"},
    }
    return env


def rendered(env: Environment, view: View, page: Page, name: str, parameters: Parameters) -> str:
    """A page as HTML."""
    kept = [(k, v) for k, v in parameters if k not in ("format", "part")]
    try:
        named = [row["named"] for row in view.runs()] if page.status in (200, 202) else []
    except PrefabError:
        named = []
    return env.get_template(page.template).render(
        page=page,
        name=name,
        nav=[(at, words) for at, words in NAV if not (view.bundle and at == "label")],
        here=urlencode(kept),
        runs_named=named,
        store=view.shown,
        bundle=view.bundle,
        problem=view.reader.problem,
        **{key: value for key, value in page.data.items() if key != "runs_named"},
    )


def as_json(page: Page) -> bytes:
    """What a page shows, as JSON."""
    value = page.data if page.json is None else page.json
    return orjson.dumps(value, default=str, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)


def failed(error: PrefabError) -> Page:
    """The page that says what went wrong, in place of another one."""
    if isinstance(error, FillingError):
        return Page(
            "filling.jinja",
            "The store is being filled",
            {"message": str(error)},
            status=202,
            live=True,
        )
    status = 404 if isinstance(error, ConfigError) else 500
    return Page(
        "error.jinja",
        "Not found" if status == 404 else "Error",
        {"message": str(error)},
        status=status,
    )


class Site:
    """The pages of one store."""

    def __init__(self, view: View) -> None:
        self.view, self.env = view, environment()

    async def page(self, request: Request) -> Response:
        """Any page that is looked at."""
        name = request.path_params["name"]
        parameters = parse_qsl(request.url.query, keep_blank_values=False, max_num_fields=100)
        if name not in PAGES:
            return self._answer(failed(ConfigError("there is no such page")), name, parameters)
        make = PAGES[name]
        return await run_in_threadpool(
            self._made, lambda: make(self.view, parameters), name, parameters
        )

    def _made(self, make: Callable[[], Page], name: str, parameters: Parameters) -> Response:
        try:
            page = make()
        except PrefabError as error:
            page = failed(error)
        return self._answer(page, name, parameters)

    def _answer(self, page: Page, name: str, parameters: Parameters) -> Response:
        if ("format", "json") in parameters:
            return Response(as_json(page), page.status, media_type="application/json")
        html = rendered(self.env, self.view, page, name, parameters)
        return Response(html, page.status, page.headers, "text/html")

    async def labelled(self, request: Request) -> Response:
        """A label, or its undoing; then the next comparison."""
        try:
            fields = await form(request)
            await run_in_threadpool(say, self.view, fields)
        except PrefabError as error:
            if "already" not in str(error):
                return self._answer(failed(error), "label", [])
        kept = [(k, v) for k, v in fields if k in ("run", "annotator", "first", "principle") and v]
        return RedirectResponse(f"/label?{urlencode(kept)}", 303)

    async def edit(self, request: Request) -> Response:
        """What the editor of a constitution asks."""
        try:
            fields = await form(request)
        except PrefabError as error:
            return self._answer(failed(error), "constitution", [])
        if ("do", "save") in fields:
            name, text = download(fields)
            headers = {"Content-Disposition": f'attachment; filename="{name}"'}
            return PlainTextResponse(text.encode("utf-8", "replace"), headers=headers)
        return await run_in_threadpool(
            self._made, lambda: edited(self.view, fields), "constitution", []
        )

    async def text(self, request: Request) -> Response:
        """The whole text of an answer, as plain text."""
        of = request.query_params
        try:
            text = await run_in_threadpool(
                raw_text, self.view, of.get("id", ""), of.get("run", ""), of.get("side", "")
            )
        except PrefabError as error:
            return PlainTextResponse(str(error), 404)
        return PlainTextResponse(text.encode("utf-8", "replace"))


async def static(request: Request) -> Response:
    """A file of the page itself; there are only these."""
    name = request.path_params["name"]
    if name not in STATIC:
        return PlainTextResponse("there is no such file", 404)
    return Response((HERE / "static" / name).read_bytes(), media_type=STATIC[name])


async def form(request: Request) -> list[tuple[str, str]]:
    """The fields of a form that a page sent.

    Raises: ConfigError for one that is too large or is not text.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise ConfigError(f"at most {MOST_BYTES:,} bytes can be sent")
    try:
        return parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=100)
    except ValueError as error:
        raise ConfigError("the form cannot be read") from error


Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(view: View, token: str, port: int) -> ASGIApp:
    """The server's application."""
    site = Site(view)

    async def first(request: Request) -> Response:
        return RedirectResponse("/runs", 303)

    routes = [
        Route("/", first),
        Route("/static/{name}", static),
        Route("/text", site.text),
        Route("/label", site.labelled, methods=["POST"]),
        Route("/constitution", site.edit, methods=["POST"]),
        Route("/{name}", site.page),
    ]
    return Gate(Starlette(routes=routes), token, port)


def new_token() -> str:
    """A token that nobody can guess."""
    return secrets.token_urlsafe(32)
