"""Web servers and object stores as sources."""

import contextlib
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from rangeserver import File, serving

import quire

MIB = 1 << 20
CONTENT = os.urandom(9 * MIB + 123)


@pytest.fixture
def file() -> File:
    return File(CONTENT)


@pytest.fixture
def url(file: File) -> Iterator[str]:
    with serving(file) as url:
        yield url


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def test_ranges(url: str) -> None:
    with quire.HTTPSource(url) as source, ThreadPoolExecutor(8) as pool:
        assert source.size == len(CONTENT)
        assert source.read() == CONTENT
        reads = {at: pool.submit(source.read, at, 65536) for at in range(0, 4 * MIB, 99_999)}
        for at, read in reads.items():
            assert read.result() == CONTENT[at : at + 65536]


def test_a_region_of_a_url(url: str) -> None:
    with quire.open(url) as region:
        assert region.read(5, 100) == CONTENT[5:105]


def test_queries_redirections_and_pickling(url: str) -> None:
    with quire.HTTPSource(url.replace("/file", "/moved?to=file")) as source:
        assert source.read(7, 9) == CONTENT[7:16]
        assert source.name.endswith("/moved")
        with pickle.loads(pickle.dumps(source)) as again:
            assert again.read(7, 9) == CONTENT[7:16]


def test_headers_and_credentials(url: str, file: File) -> None:
    secret = url.replace("http://", "http://me:it%20is@")
    with quire.HTTPSource(secret, headers={"X-Token": "42"}) as source:
        source.read(0, 10)
        assert "it" not in source.name
    assert {request["X-Token"] for request in file.requests} == {"42"}
    assert {request["Authorization"] for request in file.requests} == {"Basic bWU6aXQgaXM="}


def test_an_empty_file(url: str, file: File) -> None:
    file.content = b""
    with quire.HTTPSource(url) as source:
        assert source.read() == b""


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("etag", ['"two"', 'W/"two"'])
def test_a_changed_file(url: str, file: File, honest: bool, etag: str) -> None:
    file.honours_conditions = honest
    if etag.startswith("W/"):
        file.etag = 'W/"one"'
    with quire.HTTPSource(url) as source:
        assert source.read(0, 5) == CONTENT[:5]
        file.etag, file.content = etag, bytes(len(CONTENT))
        with pytest.raises(quire.PageError, match="the object changed since it was opened"):
            source.read(5, 5)


def test_another_size_without_validators(url: str, file: File) -> None:
    file.etag = None
    with quire.HTTPSource(url) as source:
        file.content = CONTENT[:-1]
        with pytest.raises(quire.PageError, match="the object changed"):
            source.read(5, 5)


def test_servers_that_ignore_ranges(url: str, file: File) -> None:
    with quire.HTTPSource(url) as source:
        file.honours_ranges = False
        with pytest.raises(quire.PageError, match="ignores ranges now"):
            source.read(5, 5)
    with pytest.raises(quire.PageError, match="ignores ranges"):
        quire.HTTPSource(url)


def test_what_passes_is_repeated(url: str, file: File) -> None:
    file.busy = 2
    with quire.HTTPSource(url) as source:
        file.busy = 2
        assert source.read(1, 5) == CONTENT[1:6]
        file.cut_after = 100
        assert source.read(1, 5000) == CONTENT[1:5001]


def test_nothing_there(url: str) -> None:
    with pytest.raises(FileNotFoundError, match="404"):
        quire.HTTPSource(url.replace("/file", "/other"))
    with pytest.raises(quire.PageError, match=r"within 0\.2 s.*ConnectionRefusedError"):
        quire.HTTPSource(f"http://127.0.0.1:{unused_port()}/", timeout=0.2)
    with pytest.raises(ValueError, match="http and https"):
        quire.HTTPSource("ftp://example/")


def test_a_slow_server_and_the_timeout(url: str, file: File) -> None:
    with quire.HTTPSource(url, timeout=1.5) as source:
        assert source.read(0, 5) == CONTENT[:5]
        file.stuck = threading.Event()
        with pytest.raises(quire.PageError, match=r"within 1\.5 s|timed out"):
            source.read(5, 5)
        file.stuck.set()
        file.stuck = None
        assert source.read(5, 5) == CONTENT[5:10]


NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@contextlib.contextmanager
def nginx(folder: pathlib.Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Serve a folder; the block gets the process, which answers by then."""
    (folder / "nginx.conf").write_text(
        "daemon off; master_process off; pid nginx.pid; error_log stderr;\n"
        "events {}\n"
        f"http {{ access_log off; client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f;\n"
        "uwsgi_temp_path u; scgi_temp_path s;\n"
        f"server {{ listen 127.0.0.1:{port}; root {folder}/www; }} }}\n"
    )
    assert NGINX
    server = subprocess.Popen([NGINX, "-p", folder, "-c", "nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
        yield server
    finally:
        server.kill()
        server.wait()


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed; tools/test_servers installs it")
def test_nginx_killed_and_restarted_in_mid_read(tmp_path: pathlib.Path) -> None:
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "data").write_bytes(CONTENT)
    port = unused_port()
    with contextlib.ExitStack() as servers, ThreadPoolExecutor(4) as pool:
        server = servers.enter_context(nginx(tmp_path, port))
        source = servers.enter_context(quire.HTTPSource(f"http://127.0.0.1:{port}/data"))
        reads = {at: pool.submit(source.read, at, 70_000) for at in range(0, 8 * MIB, 50_021)}
        next(iter(reads.values())).result()
        server.kill()
        server.wait()
        servers.enter_context(nginx(tmp_path, port))
        for at, read in reads.items():
            assert read.result() == CONTENT[at : at + 70_000]
        (tmp_path / "www" / "data").write_bytes(b"other")
        with pytest.raises(quire.PageError, match="the object changed"):
            source.read(0, 5)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The endpoint of an S3-compatible server."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("obstore")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_objects_in_s3(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore
    from obstore.store import S3Store

    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT": s3,
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    import urllib.request

    urllib.request.urlopen(urllib.request.Request(f"{s3}/bucket", method="PUT")).close()
    store = S3Store("bucket")
    obstore.put(store, "a/key", CONTENT)
    with quire.ObjectSource("s3://bucket/a/key") as source:
        assert source.size == len(CONTENT)
        assert source.read() == CONTENT
        obstore.put(store, "a/key", bytes(len(CONTENT)))
        with pytest.raises(quire.PageError, match="the object changed"):
            source.read(0, 5)
    with pytest.raises(FileNotFoundError):
        quire.ObjectSource("s3://bucket/other")


def test_objects_in_files(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("obstore")
    path = tmp_path / "data"
    path.write_bytes(CONTENT)
    with quire.ObjectSource(path.as_uri()) as source:
        assert source.read() == CONTENT
        path.write_bytes(b"something else")
        with pytest.raises(quire.PageError, match="the object changed"):
            source.read(0, 5)
