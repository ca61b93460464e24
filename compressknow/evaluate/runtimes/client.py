"""Requests to a server: retried if that may help, with responses bounded and checked, and the API key in no message.

requests and urllib3 decide when to wait and how long (`urllib3.util.Retry`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from compressknow.base.errors import CompressknowError
from compressknow.base.format import clean
from compressknow.base.reading import find_mismatch, parse_json

KEYS = ("COMPRESSKNOW_API_KEY", "OPENAI_API_KEY")
# Temporary errors: too many requests, a server that is loading its model, a proxy of one that is starting.
TEMPORARY = (408, 429, 500, 502, 503, 504)
# Ten times the largest distribution over a whole vocabulary.
MOST_BYTES = 256 << 20
PIECE = 1 << 16
# Seconds: to connect; the longest pause that a server may ask for; the first pause, doubled each time.
CONNECT, LONGEST_PAUSE, FIRST_PAUSE = 10.0, 60.0, 0.5
# Retries of a request that fails, and of one whose connection breaks.
TRIES, READS = 5, 2
REPEAT = "Then repeat the command: answers so far are kept."


class RequestRefused(CompressknowError):
    """Error response, or one of the wrong form, from a server; `status` is that of HTTP."""

    def __init__(self, what: str, why: str | None = None, hint: str | None = None, *, status: int = 200) -> None:
        super().__init__(what, why, hint)
        self.status = status


class Client:
    """One server, which several threads may use. `url` is all before ``/v1``, `timeout` the seconds for each attempt of
    a request, `parallel` the number of connections in the pool."""

    def __init__(self, url: str, *, timeout: float, parallel: int = 1) -> None:
        # The timeout may be infinite, which sockets do not accept.
        self.url, self._timeout = url, min(timeout, threading.TIMEOUT_MAX)
        self._key = next((key for name in KEYS if (key := os.environ.get(name, "").strip())), None)
        self._has_answered = False
        self._session = requests.Session()
        # Otherwise requests would send the credentials that a .netrc file has for the host.
        self._session.auth = self._add_key
        # Evaluating changes nothing on a server, so any request may be repeated.
        retries = _BoundedRetry(
            total=TRIES,
            connect=READS,
            read=READS,
            status_forcelist=TEMPORARY,
            allowed_methods=None,
            backoff_factor=FIRST_PAUSE,
            backoff_jitter=FIRST_PAUSE,
            raise_on_status=False,
        )
        adapter = HTTPAdapter(pool_maxsize=parallel, max_retries=retries)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def _add_key(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def close(self) -> None:
        self._session.close()

    def request(self, path: str, form: Any, content: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON of a path or, with `content`, of the response to it, checked for a form (see
        `find_mismatch`). Raise RequestRefused for any other response, CompressknowError if there is none."""
        try:
            status, body = self._send(path, content)
        except (requests.RequestException, HTTPError, TimeoutError) as error:
            raise self._explain_failure(error) from None
        self._has_answered = True
        try:
            parsed = parse_json(body)
        except ValueError:
            parsed = None
        if status != 200:
            raise self._explain_refusal(status, parsed)
        if parsed is None:
            raise self._refuse_content(path, "something that is not JSON")
        if mismatch := find_mismatch(parsed, form):
            raise self._refuse_content(path, f"unexpected JSON: {clean(mismatch, 200)}")
        return parsed

    def _send(self, path: str, content: Mapping[str, Any] | None) -> tuple[int, bytes]:
        """Return the status and the body of the response; repeat the request if the body breaks off."""
        method = "GET" if content is None else "POST"
        timeouts = (min(CONNECT, self._timeout), self._timeout)
        options: Any = {"json": content, "timeout": timeouts, "allow_redirects": False, "stream": True}
        for attempt in range(1 + READS):
            with self._session.request(method, f"{self.url}{path}", **options) as response:
                try:
                    return response.status_code, self._read_body(path, response)
                except (HTTPError, TimeoutError):
                    if attempt == READS:
                        raise
            time.sleep(FIRST_PAUSE * 2**attempt)
        raise AssertionError

    def _read_body(self, path: str, response: requests.Response) -> bytes:
        """Read a body. Raise TimeoutError if all of it exceeds the timeout, which requests applies to each part."""
        end, body = time.monotonic() + self._timeout, bytearray()
        while piece := response.raw.read1(PIECE, decode_content=True):
            if time.monotonic() > end:
                raise TimeoutError
            body += piece
            if len(body) > MOST_BYTES:
                raise self._refuse_content(path, f"more than {MOST_BYTES >> 20} MB")
        return bytes(body)

    def _explain_refusal(self, status: int, content: Any) -> RequestRefused:
        what, hint = "answers with an error", None
        if status in (401, 403):
            what = "does not accept the key" if self._key else "requires a key"
            hint = f"Set {KEYS[0]} to the server's key."
        elif 300 <= status < 400:
            what, hint = "redirects to another address", "Give that address."
        elif status == 404:
            hint = "It must have the model and /v1/completions, not only an API for chats."
        elif status in TEMPORARY:
            hint = f"Wait, lower --parallel, or look at the server's log. {REPEAT}"
        return RequestRefused(f"{self.url} {what} (HTTP {status}).", self._find_message(content), hint, status=status)

    def _explain_failure(self, error: Exception) -> CompressknowError:
        # Only the class of these errors is informative; their text has internal objects and addresses.
        if isinstance(error, requests.Timeout | TimeoutError) or "Read timed out" in str(error):
            return CompressknowError(
                f"{self.url} does not answer within {self._timeout:g} s.",
                hint=f"Raise --timeout, lower --parallel, or look at the server's log. {REPEAT}",
            )
        if isinstance(error, requests.exceptions.SSLError):
            return CompressknowError(f"{self.url} has no certificate that can be trusted, or does not speak https.")
        if isinstance(error, requests.exceptions.ProxyError):
            return CompressknowError(
                f"The proxy for {self.url} fails.", hint="Check HTTP_PROXY, HTTPS_PROXY and NO_PROXY."
            )
        if isinstance(error, HTTPError) or "aborted" in str(error):
            return CompressknowError(f"{self.url} closes the connection.", hint="Look at the server's log.")
        if self._has_answered:
            return CompressknowError(
                f"{self.url} no longer answers.",
                hint=f"Start the server again. {REPEAT}",
            )
        return CompressknowError(
            f"There is no server at {self.url}.", hint="Start it, and give the address that it prints: http://HOST:PORT"
        )

    def _refuse_content(self, path: str, what: str) -> RequestRefused:
        hint = "Is it an OpenAI-compatible server of a language model?"
        return RequestRefused(f"{self.url} answers {path} with {what}.", hint=hint)

    def _find_message(self, content: Any) -> str | None:
        """Return the server's error message from one of the usual keys, with the API key masked."""
        for name in ("error", "message", "detail"):
            content = content.get(name, content) if isinstance(content, dict) else content
        if not isinstance(content, str):
            return None
        return f"It says: {clean(content.replace(self._key, '...') if self._key else content, 200)}"


class _BoundedRetry(Retry):
    """Retries that wait at most `LONGEST_PAUSE`, even if the server asks for hours."""

    def get_retry_after(self, response: Any) -> float | None:
        pause = None
        with contextlib.suppress(Exception):  # A header that is neither a date nor a number.
            pause = super().get_retry_after(response)
        return None if pause is None else min(pause, LONGEST_PAUSE)
