"""S3 as moto plays it, for fsspec: a plugin for the modules that use it."""

import concurrent.futures
import logging
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

import pytest

Put = Callable[[str, bytes], str]


@pytest.fixture(scope="session")
def fsspec_threads() -> None:
    """fsspec has one thread for all that is asynchronous, and its loop one for what blocks; both stay for good."""
    import fsspec.asyn

    loop = fsspec.asyn.get_loop()
    executor = concurrent.futures.ThreadPoolExecutor(1, "fsspec executor")
    executor.submit(int).result()
    loop.call_soon_threadsafe(loop.set_default_executor, executor)


@pytest.fixture(scope="session")
def object_store(fsspec_threads: None) -> Iterator[str]:
    """The endpoint of a server."""
    from moto.server import ThreadedMotoServer

    # Of every request a line.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(object_store: str, monkeypatch: pytest.MonkeyPatch) -> Put:
    """``put(key, content)`` puts an object into the bucket "models", and returns its URL. Empty at first."""
    for name, value in {
        "AWS_ENDPOINT_URL": object_store,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
        # Otherwise the server keeps objects in temporary files, which look as if a test had left them open.
        "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(1 << 30),
    }.items():
        monkeypatch.setenv(name, value)

    def request(path: str, method: str, content: bytes = b"") -> None:
        headers = {
            "Content-Type": "application/octet-stream",
            # moto looks at who someone is, and at no signature.
            "Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request, "
            "SignedHeaders=host, Signature=none",
        }
        asked = urllib.request.Request(object_store + urllib.parse.quote(path), content, headers, method=method)
        with urllib.request.urlopen(asked, timeout=20) as answer:
            assert answer.status == 200

    request("/moto-api/reset", "POST")
    request("/models", "PUT")

    def put(key: str, content: bytes) -> str:
        request(f"/models/{key}", "PUT", content)
        return f"s3://models/{key}"

    return put
