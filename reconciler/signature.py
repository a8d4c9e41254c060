"""Signatures of what is posted: the symmetric scheme of the Standard Webhooks specification (standardwebhooks.com), `v1`."""

import hmac
from base64 import b64decode, b64encode
from hashlib import sha256
from typing import Final

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - says that a secret follows


def key_of(secret: str) -> bytes:
    """The key of a secret: base64 behind `whsec_`, as the specification writes one; any other secret is the key itself.

    Raises:
        ValueError: what stands behind `whsec_` is no base64.
    """
    if secret.startswith(SECRET_PREFIX):
        return b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    return secret.encode()


def signed_headers(key: bytes, message_id: str, at_s: int, body: bytes) -> dict[str, str]:
    """The three headers of a message. `at_s`: when this attempt is made, in seconds since the Unix epoch."""
    signature = hmac.digest(key, b"%b.%d.%b" % (message_id.encode(), at_s, body), sha256)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(at_s),
        "webhook-signature": f"v1,{b64encode(signature).decode()}",
    }
