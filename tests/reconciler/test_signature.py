"""Tests for reconciler.signature."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from reconciler.signature import key_of, signed_headers

# The published example of the specification's reference libraries.
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
MESSAGE_ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
BODY = b'{"test": 2432232314}'


def test_the_signature_is_the_specifications() -> None:
    """The known answer of the Standard Webhooks libraries for their own example."""
    assert signed_headers(key_of(SECRET), MESSAGE_ID, 1_614_265_330, BODY) == {
        "webhook-id": MESSAGE_ID,
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_a_plain_secret_is_the_key() -> None:
    """Without the prefix nothing is decoded, also where it looks like base64."""
    assert key_of("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw") == b"MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.mark.parametrize("secret", ["whsec_not base64", "whsec_abc"])
def test_a_broken_secret_is_refused(secret: str) -> None:
    """Instead of a key that nobody else computes."""
    with pytest.raises(ValueError):
        key_of(secret)


@pytest.mark.parametrize("secret", [SECRET, "sesame-sesame-sesame"])
def test_the_documented_receiver_verifies_it(secret: str) -> None:
    """The lines of docs/webhook.md take what we sign, and nothing that was changed or is old."""
    page = (Path(__file__).parents[2] / "docs" / "webhook.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def is_ours" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    is_ours = names["is_ours"]
    now_s = int(time.time())
    headers = signed_headers(key_of(secret), MESSAGE_ID, now_s, BODY)
    assert is_ours(secret, headers, BODY)
    assert is_ours(secret, headers | {"webhook-signature": f"v1a,other {headers['webhook-signature']}"}, BODY)
    assert not is_ours(secret, headers, BODY + b" ")
    assert not is_ours(secret, headers | {"webhook-id": "msg_other"}, BODY)
    assert not is_ours(secret, headers | {"webhook-timestamp": str(now_s - 1)}, BODY)
    assert not is_ours("another", headers, BODY)
    assert not is_ours(secret, signed_headers(key_of(secret), MESSAGE_ID, now_s - 400, BODY), BODY)
