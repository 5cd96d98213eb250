"""moto's S3 as a server of this process, which answers one request after another: moto itself looks
whether an object is there before it writes it, without a lock between both.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from prefab.factory.object_store import ObjectFiles, files_at
from prefab.factory.shared_files import SharedFiles

BUCKET = "prefab-tests"


@contextmanager
def s3_server(change: Callable[[dict[str, Any]], None] = lambda request: None) -> Iterator[None]:
    """While there is a server with a bucket, which the environment names. `change` may change the
    WSGI environment of a request.
    """
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    moto = DomainDispatcherApplication(create_backend_app)

    def app(request: dict[str, Any], start: Any) -> Any:
        change(request)
        return moto(request, start)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, app, threaded=False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            environment.setenv(name, value)
        try:
            import boto3

            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield
        finally:
            server.shutdown()
            thread.join()


def bucket_files(folder: str) -> SharedFiles:
    """The files of a folder of the bucket."""
    files = files_at(f"s3://{BUCKET}/{folder}")
    assert isinstance(files, ObjectFiles)
    return files
