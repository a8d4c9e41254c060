"""Whoever makes tokens: keys, tokens good and forged, and a real HTTP server that publishes key sets."""

import json
import warnings
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

from joserfc import jws
from joserfc.jwk import ECKey, Key, OctKey, OKPKey, RSAKey

from tests.fakes.clock import BORN_MS

SECRET = "the secret of these tests has 41 bytes :-)"
BORN_S = BORN_MS // 1_000
HOUR_S = 3_600


@cache
def key(name: str, kind: str = "Ed25519") -> Key:
    """A key pair whose `kid` is `name`, made once."""
    parameters: Any = {"kid": name}
    if kind == "RSA":
        return RSAKey.generate_key(2_048, parameters)
    if kind.startswith("P-"):
        return ECKey.generate_key(kind, parameters)
    return OKPKey.generate_key(kind, parameters)


def key_set(*keys: Key, **members: Any) -> bytes:
    """The public halves, as an issuer publishes them; `members` are added to each."""
    return json.dumps({"keys": [made.as_dict(private=False, **members) for made in keys]}).encode()


def claims(**changes: Any) -> dict[str, Any]:
    """Good claims for an hour; None leaves one out."""
    found = {"sub": "somebody", "exp": BORN_S + HOUR_S} | changes
    return {name: value for name, value in found.items() if value is not None}


def token(signer: Key | str = SECRET, algorithm: str | None = None, /, **changes: Any) -> str:
    """A token with good claims but for `changes`: HS256 for a secret, else with the key's own algorithm and id."""
    if isinstance(signer, str):
        return signed({"alg": algorithm or "HS256"}, signer, claims(**changes))
    return signed({"alg": algorithm or "EdDSA", "kid": signer.kid}, signer, claims(**changes))


def signed(header: dict[str, Any], signer: Key | str, content: Any) -> str:
    """A token with this header and these claims, whatever they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old names and short keys: both are wanted here
        made = OctKey.import_key(signer) if isinstance(signer, str) else signer
        return jws.serialize_compact(header, json.dumps(content), made, registry=_Anything(algorithms=[header["alg"]]))


class _Anything(jws.JWSRegistry):
    """Signs whatever header there is."""

    def check_header(self, header: dict[str, Any]) -> None:
        pass


def assembled(header: Any, content: Any, signature: bytes = b"") -> str:
    """A token put together by hand, signed by nobody."""
    parts = (json.dumps(header).encode(), json.dumps(content).encode(), signature)
    return ".".join(urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


class Publisher:
    """An HTTP server on loopback that answers every GET with `body`, and counts."""

    def __init__(self, body: bytes = b"", port: int = 0) -> None:
        self.body = body
        self.status = 200
        self.asked = 0
        self.answering = Event()
        """Cleared, requests wait."""
        self.answering.set()
        publisher = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                publisher.asked += 1
                publisher.answering.wait()
                self.send_response(publisher.status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                # Whoever has read enough hangs up.
                try:
                    self.wfile.write(publisher.body)
                except OSError:
                    self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/jwks.json"
        self._thread = Thread(target=lambda: self._server.serve_forever(0.01), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer nobody any more, and give the port back."""
        self.answering.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def publisher(body: bytes = b"", port: int = 0) -> Iterator[Publisher]:
    """A publisher for the duration of a block."""
    made = Publisher(body, port)
    try:
        yield made
    finally:
        made.stop()
