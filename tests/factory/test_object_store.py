"""What an error of an object store says in one line; the rest needs a server
(tests/pipelines/scale/test_object_store.py)."""

from __future__ import annotations

from prefab.factory.console import fail
from prefab.factory.object_store import ObjectStoreError, _reason


def test_an_error_in_one_line() -> None:
    refused = "Generic S3 error: <Error><Code>AccessDenied</Code>\n<Message>No.</Message></Error>"
    assert _reason(refused) == "AccessDenied: No."
    role = "Error performing PUT http://169.254.169.254/latest/api/token: 403 Forbidden"
    assert _reason(role).startswith("no credentials. Set AWS_ACCESS_KEY_ID and")
    assert (
        _reason("error\n  sending request\n\nDebug source:\nHttp { .. }") == "error sending request"
    )


def test_the_help_after_an_error_is_about_the_object_store(capsys) -> None:
    fail(ObjectStoreError("s3://bucket/run: Connection refused"))
    told = " ".join(capsys.readouterr().err.split())
    assert "Connection refused help AWS_ENDPOINT_URL names its server" in told
