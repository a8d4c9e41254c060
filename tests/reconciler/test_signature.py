"""Tests for reconciler.signature."""

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
