"""Requests to a server: tried again where that may help, answers bounded in time and size and checked for their form,
and the key in no message.

By requests and urllib3, which know when to wait and how long (`urllib3.util.Retry`).
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
# Temporary errors: too many requests, a server that loads its model, a proxy before one that starts.
PASSING = (408, 429, 500, 502, 503, 504)
# The largest distribution over a whole vocabulary is a tenth of that.
MOST_BYTES = 256 << 20
PIECE = 1 << 16
# Seconds: to be connected; the longest that a server may ask to wait; the first pause, doubled each time.
CONNECT, LONGEST_PAUSE, FIRST_PAUSE = 10.0, 60.0, 0.5
# Attempts for a request that is refused, and for one whose connection breaks.
TRIES, READS = 5, 2


class RequestRefused(CompressknowError):
    """Error of a server that answered, but not with what it was asked for; `status` is HTTP's."""

    def __init__(self, what: str, why: str | None = None, hint: str | None = None, *, status: int = 200) -> None:
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
        # Sockets take no infinity, for a server that may take as long as it needs.
        self.url, self._timeout = url, min(timeout, threading.TIMEOUT_MAX)
        self._key = next((key for name in KEYS if (key := os.environ.get(name, "").strip())), None)
        self._session = requests.Session()
        # Without it, requests would send what a .netrc file holds for the host.
        self._session.auth = self._add_key
        # Evaluating changes nothing on a server: any request may be sent again.
        retries = _Patience(
            total=TRIES,
            connect=READS,
            read=READS,
            status_forcelist=PASSING,
            allowed_methods=None,
            backoff_factor=FIRST_PAUSE,
            backoff_jitter=FIRST_PAUSE,
            backoff_max=LONGEST_PAUSE,
            raise_on_status=False,
        )
        adapter = HTTPAdapter(pool_maxsize=parallel, max_retries=retries)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def _add_key(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def get(self, path: str, form: Any) -> Any:
        """Return the JSON of a path, in a form of `find_mismatch`. Raise Refused where it answers otherwise."""
        return self._request("GET", path, None, form)

    def post(self, path: str, content: Mapping[str, Any], form: Any) -> Any:
        """Return the JSON that the server answers to `content`, in that form. Raises as `get` does."""
        return self._request("POST", path, content, form)

    def close(self) -> None:
        self._session.close()

    def _request(self, method: str, path: str, content: Mapping[str, Any] | None, form: Any) -> Any:
        try:
            status, body = self._send(method, path, content)
        except (requests.RequestException, HTTPError, TimeoutError) as error:
            raise self._explain_failure(error) from None
        try:
            found = parse_json(body)
        except ValueError:
            found = None
        if status != 200:
            raise self._explain_refusal(status, found)
        if found is None:
            raise self._refuse_content(path, "what is not JSON")
        if wrong := find_mismatch(found, form):
            raise self._refuse_content(path, f"JSON of another form: {clean(wrong, 200)}")
        return found

    def _send(self, method: str, path: str, content: Mapping[str, Any] | None) -> tuple[int, bytes]:
        """Return the status and the body of the answer, which is asked for again where it breaks off."""
        timeouts = (min(CONNECT, self._timeout), self._timeout)
        how: Any = {"json": content, "timeout": timeouts, "allow_redirects": False, "stream": True}
        for read in range(1 + READS):
            with self._session.request(method, f"{self.url}{path}", **how) as response:
                try:
                    return response.status_code, self._read_body(path, response)
                except (HTTPError, TimeoutError):
                    if read == READS:
                        raise
            time.sleep(FIRST_PAUSE * 2**read)
        raise AssertionError

    def _read_body(self, path: str, response: requests.Response) -> bytes:
        """Read a body. Raise TimeoutError if all of it takes longer than requests waits for a part of it."""
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
            what = "does not take the key" if self._key else "wants a key"
            hint = f"Set {KEYS[0]} to the server's key."
        elif 300 <= status < 400:
            what, hint = "sends requests elsewhere", "Give that address."
        elif status == 404:
            hint = "It must have /v1/completions and the model; a server that only chats will not do."
        elif status in PASSING:
            hint = "Wait, lower --parallel, or look at the server's log."
        return RequestRefused(f"{self.url} {what} (HTTP {status}).", self._find_message(content), hint, status=status)

    def _explain_failure(self, error: Exception) -> CompressknowError:
        # The text of these errors names addresses and objects, and says no more than their kind.
        if isinstance(error, requests.Timeout | TimeoutError) or "Read timed out" in str(error):
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
        if isinstance(error, HTTPError) or "aborted" in str(error):
            return CompressknowError(f"{self.url} closes the connection.", hint="Look at the server's log.")
        return CompressknowError(
            f"There is no server at {self.url}.", hint="Start it, and give the address that it prints: http://HOST:PORT"
        )

    def _refuse_content(self, path: str, what: str) -> RequestRefused:
        hint = "Is it an OpenAI-compatible server of a language model?"
        return RequestRefused(f"{self.url} answers {path} with {what}.", hint=hint)

    def _find_message(self, content: Any) -> str | None:
        """Return the server's message, of the forms in use; without the key, should it be in there."""
        for name in ("error", "message", "detail"):
            content = content.get(name, content) if isinstance(content, dict) else content
        if not isinstance(content, str):
            return None
        return f"It says: {clean(content.replace(self._key, '...') if self._key else content, 200)}"


class _Patience(Retry):
    """Retries that give a server that asks for a pause of hours a minute."""

    def get_retry_after(self, response: Any) -> float | None:
        pause = None
        with contextlib.suppress(Exception):  # A header that is neither a date nor a number.
            pause = super().get_retry_after(response)
        return None if pause is None else min(pause, LONGEST_PAUSE)
