"""Requests to a server: tried again where that may help, answers bounded in time and size and checked for their form,
and the key in no message.

By requests and urllib3, which know when to wait and how long (`urllib3.util.Retry`).
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import threading
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3 import HTTPConnectionPool, HTTPResponse
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from compressknow.base.errors import CompressknowError
from compressknow.base.format import plain
from compressknow.base.reading import find_mismatch, parse_json

KEYS = ("COMPRESSKNOW_API_KEY", "OPENAI_API_KEY")
# What may pass: too many requests, a server that loads its model, a proxy before one that starts.
PASSING = (408, 429, 500, 502, 503, 504)
# The largest distribution over a whole vocabulary is a tenth of that.
MOST_BYTES = 256 << 20
PIECE = 1 << 16
# Seconds: to be connected; the longest that a server may ask to wait; the first pause, doubled each time.
CONNECT, LONGEST_PAUSE, FIRST_PAUSE = 10.0, 60.0, 0.5
TRIES = 5


class Refused(CompressknowError):
    """Error of a server that answered, but not with what it was asked for; `status` is HTTP's."""

    def __init__(self, status: int, what: str, why: str | None = None, hint: str | None = None) -> None:
        super().__init__(what, why, hint)
        self.status = status


class Client:
    """One server. Methods may be called from several threads.

    Parameters
    ----------
    url : scheme, host and port, and what path there is before ``/v1``.
    timeout : seconds for an answer, each time that it is asked for.
    parallel : connections that are kept.
    """

    def __init__(self, url: str, *, timeout: float, parallel: int = 1) -> None:
        self.url, self._timeout = url, timeout
        self._key = next((key for name in KEYS if (key := os.environ.get(name, "").strip())), None)
        self._session = requests.Session()
        self._session.auth = _Key(self._key)
        adapter = _Adapter(pool_maxsize=parallel, max_retries=_make_retries())
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def get(self, path: str, form: Any) -> Any:
        """Return the JSON of a path, in a form of `compressknow.base.reading.find_mismatch`.

        Raises CompressknowError: `Refused` where the server answers with an error or in another form.
        """
        return self._request("GET", path, None, form)

    def post(self, path: str, content: Mapping[str, Any], form: Any) -> Any:
        """Return the JSON that the server answers to `content`, in that form. Raises what `get` does."""
        return self._request("POST", path, content, form)

    def close(self) -> None:
        self._session.close()

    def _request(self, method: str, path: str, content: Mapping[str, Any] | None, form: Any) -> Any:
        timeouts = (min(CONNECT, self._timeout), self._timeout)
        how: Any = {"json": content, "timeout": timeouts, "allow_redirects": False, "stream": True}
        try:
            response = self._session.request(method, f"{self.url}{path}", **how)
        except (requests.RequestException, HTTPError) as error:
            raise self._explain_failure(error) from None
        # Read already: see `_add_deadline`.
        response.raw.release_conn()
        return self._read(path, response.status_code, response.raw.data, form)

    def _read(self, path: str, status: int, body: bytes, form: Any) -> Any:
        if len(body) > MOST_BYTES:
            raise self._refuse_content(path, f"more than {MOST_BYTES >> 20} MB")
        try:
            content = parse_json(body)
        except ValueError:
            content = None
        if status != 200:
            raise self._explain_refusal(status, content)
        if content is None:
            raise self._refuse_content(path, "what is no JSON")
        if wrong := find_mismatch(content, form):
            raise self._refuse_content(path, f"JSON of another form: {plain(wrong, 200)}")
        return content

    def _explain_refusal(self, status: int, content: Any) -> Refused:
        message = self._find_message(content)
        if status in (401, 403):
            what = "does not take the key" if self._key else "wants a key"
            return Refused(
                status, f"{self.url} {what} (HTTP {status}).", message, f"Set {KEYS[0]} to the server's key."
            )
        if 300 <= status < 400:
            return Refused(
                status, f"{self.url} sends requests elsewhere (HTTP {status}).", message, "Give that address."
            )
        hint = "Wait, lower --parallel, or look at the server's log." if status in PASSING else None
        return Refused(status, f"{self.url} answers with an error (HTTP {status}).", message, hint)

    def _explain_failure(self, error: Exception) -> CompressknowError:
        # The text of these errors names addresses and objects, and says no more than their kind.
        if isinstance(error, requests.Timeout) or "Read timed out" in str(error):
            return CompressknowError(
                f"{self.url} does not answer within {self._timeout:g} s.",
                hint="Raise --timeout, lower --parallel, or look at the server's log.",
            )
        if isinstance(error, requests.exceptions.SSLError):
            return CompressknowError(f"{self.url} has no certificate that can be trusted, or does not speak https.")
        if isinstance(error, requests.exceptions.ProxyError):
            return CompressknowError(
                f"The proxy before {self.url} fails.", hint="Look at HTTP_PROXY, HTTPS_PROXY and NO_PROXY."
            )
        if isinstance(error, HTTPError) or "aborted" in str(error) or "broken" in str(error):
            return CompressknowError(f"{self.url} breaks the connection off.", hint="Look at the server's log.")
        return CompressknowError(
            f"There is no server at {self.url}.", hint="Start it, and give the address that it prints: http://HOST:PORT"
        )

    def _refuse_content(self, path: str, what: str) -> Refused:
        hint = "Is it an OpenAI-compatible server of a language model?"
        return Refused(200, f"{self.url} answers {path} with {what}.", hint=hint)

    def _find_message(self, content: Any) -> str | None:
        """Return the server's message, of the forms in use; without the key, should it be in there."""
        for name in ("error", "message", "detail"):
            content = content.get(name, content) if isinstance(content, dict) else content
        if not isinstance(content, str):
            return None
        return f"It says: {plain(content.replace(self._key, '...') if self._key else content, 200)}"


class _Key(AuthBase):
    """Header with the key, or none; never with what a .netrc file holds for the host."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class _Adapter(HTTPAdapter):
    """Connections that read whole answers, in time."""

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> HTTPConnectionPool:
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        pool.ConnectionCls = _add_deadline(type(pool).ConnectionCls)
        return pool


@cache
def _add_deadline(kind: type[HTTPConnection]) -> type[HTTPConnection]:
    """Return connections with one deadline for a whole answer: the timeouts of urllib3 are for each read, which a
    server that drips headers, or "100 Continue" without end, never exceeds.
    """

    class InTime(kind):  # type: ignore[misc,valid-type]
        def getresponse(self) -> HTTPResponse:
            end = time.monotonic() + self.timeout
            watchdog = threading.Timer(self.timeout, _shut_down, [self.sock])
            # Who interrupts the run does not wait for it.
            watchdog.daemon = True
            watchdog.start()
            try:
                response = super().getresponse()
                body = io.BytesIO(self._body(response))
            except Exception:
                if time.monotonic() < end:
                    raise
            finally:
                watchdog.cancel()
            # What is cut off may look whole.
            if time.monotonic() >= end:
                raise TimeoutError
            headers, status = response.headers, response.status
            return HTTPResponse(body, headers, status, preload_content=False, decode_content=False)

        def _body(self, response: HTTPResponse) -> bytes:
            pieces, size = [], 0
            while size <= MOST_BYTES and (piece := response.read1(PIECE, decode_content=True)):
                pieces.append(piece)
                size += len(piece)
            if size > MOST_BYTES:
                self.close()
            return b"".join(pieces)

    return InTime


def _shut_down(connection: socket.socket) -> None:
    """End what another thread reads from it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Patience(Retry):
    """Retries that give a server that asks for a pause of hours a minute."""

    def get_retry_after(self, response: Any) -> float | None:
        pause = None
        with contextlib.suppress(Exception):  # A header that is no date and no number.
            pause = super().get_retry_after(response)
        return None if pause is None else min(pause, LONGEST_PAUSE)


def _make_retries() -> Retry:
    """Return how requests are repeated. Evaluating changes nothing on a server: any request may be sent again."""
    return _Patience(
        total=TRIES,
        connect=2,
        read=2,
        status_forcelist=PASSING,
        allowed_methods=None,
        backoff_factor=FIRST_PAUSE,
        backoff_jitter=FIRST_PAUSE,
        backoff_max=LONGEST_PAUSE,
        raise_on_status=False,
    )
