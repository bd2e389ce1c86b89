"""The example service: answers, errors, and no hang when any process is killed."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from processes import run_python

import bnfast

SERVE = Path(__file__).parent.parent / "examples" / "serve.py"
HOST, TIMEOUT = "127.0.0.1", 30

for needed in ("sklearn", "tqdm"):
    pytest.importorskip(needed, reason=f"the service needs {needed}: pip install 'bnfast[demo]'")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@contextmanager
def service(*command):
    """Start one, yield its process and port, and check that it ends when asked to."""
    command = command or (SERVE, "--port", "0", "--steps", "60", "--workers", "2")
    started = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # trains faster on a busy machine
    )
    with started:
        try:
            line = started.stdout.readline()
            assert line.startswith("listening on"), started.stderr.read()
            yield started, int(line.rpartition(":")[2])
        finally:
            if started.poll() is None:
                started.terminate()
                try:
                    started.wait(TIMEOUT)
                except subprocess.TimeoutExpired:
                    started.kill()
                    raise


def ask(port, method, path, body=None, **headers):
    with closing(http.client.HTTPConnection(HOST, port, timeout=TIMEOUT)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def answer(port, network, images):
    status, content = ask(port, "POST", f"/{network}", json.dumps({"images": images.tolist()}))
    assert status == 200, content
    return np.array(content["logits"], np.float32)


@pytest.fixture(scope="module")
def port():
    with service() as (process, port):
        yield port
    assert process.returncode == 0


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(7).random((40, 64), np.float32)


@pytest.mark.parametrize("network", ["frozen", "folded"])
def test_answer_independent_of_batch(port, images, network):
    whole = answer(port, network, images)
    assert whole.shape == (40, 10)
    for part in (images[:1], images[3:20], images[::-1], np.repeat(images[5:6], 33, axis=0)):
        rows = [np.flatnonzero((images == image).all(axis=1))[0] for image in part]
        np.testing.assert_array_equal(answer(port, network, part), whole[rows])


def test_networks_agree(port, images):
    """Folding rounds other weights: by far less than the difference of two images."""
    frozen, folded = (answer(port, network, images) for network in ("frozen", "folded"))
    assert not np.array_equal(frozen, folded)
    assert np.abs(frozen - folded).max() < 1e-3 * np.ptp(frozen, axis=0).min()


def test_the_root_lists_the_networks(port):
    status, content = ask(port, "GET", "/")
    assert status == 200
    assert content["networks"] == ["folded", "frozen"]


# ---- Drift


@pytest.fixture(scope="module")
def training():
    """The images that the service was trained with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SERVE.parent)
        return __import__("digits").load_digits().train


@pytest.fixture
def forgotten(port):
    """A port whose service has seen nothing: a list of what it saw is empty."""
    assert ask(port, "DELETE", "/drift")[0] == 200
    status, content = ask(port, "GET", "/drift")
    assert status == 200
    assert content["count"] == len(content["worst"]) == len(content["kl_divergence"]) == 0
    return port


def serve_all(port, batches):
    """Ask four at a time, so that both workers and several of their threads answer."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: answer(port, ("frozen", "folded")[n % 2], batches[n]),
                      range(len(batches))))  # fmt: skip


def test_traffic_of_training_images_does_not_drift(forgotten, training):
    """All of them once, in requests at the same time: none is lost, and the moments are equal."""
    batches = np.split(training, [1, 2, 4, 34, 98, 300, 301, 302, 500, 756, 800, 1000, 1200])
    serve_all(forgotten, batches)
    _, report = ask(forgotten, "GET", "/drift")
    assert report["count"] == len(training) == sum(map(len, batches))
    assert np.max(report["kl_divergence"]) < 1e-12
    assert np.max(np.abs(report["mean_difference"])) < 1e-12
    assert 0 < report["seconds"] < 600


def test_shifted_inputs_are_the_worst(forgotten, training):
    shifted = training.copy()
    shifted[:, [20, 43]] = 1 - shifted[:, [20, 43]] / 4
    serve_all(forgotten, np.array_split(shifted, 8))
    _, report = ask(forgotten, "DELETE", "/drift")
    assert {worst["input"] for worst in report["worst"][:2]} == {20, 43}
    want = bnfast.drift(bnfast.moments(training), bnfast.moments(shifted))
    kl = np.array(report["kl_divergence"])
    np.testing.assert_allclose(kl, want.kl_divergence, atol=1e-12)
    np.testing.assert_allclose(report["mean_difference"], want.mean_difference, atol=1e-12)
    worst = report["worst"][0]
    assert worst["kl_divergence"] == kl.max() > 5 * np.sort(kl)[-3]
    assert worst["mean_difference"] > 1
    assert len(report["worst"]) == 5
    assert ask(forgotten, "GET", "/drift")[1]["count"] == 0


def test_a_pixel_that_is_constant_once_is_null(forgotten, training):
    assert np.ptp(training[:, 0]) == 0
    image = training[:1].copy()
    image[0, 0] = 0.5
    answer(forgotten, "frozen", image)
    _, report = ask(forgotten, "GET", "/drift")
    assert report["kl_divergence"][0] is None
    assert report["worst"][0]["input"] == 0


def test_threads_and_processes_lose_no_counts():
    code = f"""
import os, sys, threading, warnings
sys.path.insert(0, {str(SERVE.parent)!r})
import bnfast, numpy as np
from serve_drift import Watch
rows = np.eye(64, dtype=np.float32)[:3]
watch = Watch(bnfast.moments(rows))
def work():
    for _ in range(200):
        watch.add(rows)
warnings.simplefilter("ignore", DeprecationWarning)  # of threads at a fork
children = []
for _ in range(2):
    children.append(os.fork())
    if not children[-1]:
        threads = [threading.Thread(target=work) for _ in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        os._exit(0)
[os.waitpid(child, 0) for child in children]
print(watch.report()["count"], watch.read()[1].mean[:4].round(3).tolist())
"""
    done = run_python(code)
    assert (done.stdout, done.stderr) == ("3600 [0.333, 0.333, 0.333, 0.0]\n", "")


def test_bad_requests_count_nothing(forgotten, images):
    for body in ("not json", "{}", json.dumps({"images": [[2] * 64]})):
        assert ask(forgotten, "POST", "/frozen", body)[0] == 400
    assert ask(forgotten, "POST", "/none", json.dumps({"images": images.tolist()}))[0] == 404
    assert ask(forgotten, "POST", "/drift", "{}")[0] == 405
    assert ask(forgotten, "DELETE", "/frozen")[0] == 404
    assert ask(forgotten, "GET", "/drift")[1]["count"] == 0


# ---- Bad requests


def image_of(value):
    return json.dumps({"images": [[value] * 64]})


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason"),
    [
        ("GET", "/none", None, 404, "no /none"),
        ("POST", "/none", "{}", 404, "no /none"),
        ("GET", "/frozen", None, 405, "expected POST"),
        ("POST", "/frozen", "not json", 400, "not JSON"),
        ("POST", "/frozen", b"\xff\xfe", 400, "not JSON"),
        ("POST", "/frozen", "[" * 100_000, 400, "not JSON"),
        ("POST", "/frozen", "[]", 400, "expected an object"),
        ("POST", "/frozen", '{"images": []}', 400, "an image or more"),
        ("POST", "/frozen", '{"images": 3}', 400, "expected an object"),
        ("POST", "/frozen", '{"images": [[1, 2], [1]]}', 400, "rows of the same length"),
        ("POST", "/frozen", '{"images": [[1, 2]]}', 400, "expected n rows of 64 numbers"),
        ("POST", "/frozen", image_of("0"), 400, "expected n rows of 64 numbers"),
        ("POST", "/frozen", image_of(None), 400, "expected n rows of 64 numbers"),
        ("POST", "/frozen", image_of(True), 400, "expected n rows of 64 numbers"),
        ("POST", "/frozen", image_of(10**400), 400, "expected n rows of 64 numbers"),
        ("POST", "/frozen", image_of(float("nan")), 400, "outside of 0 to 1"),
        ("POST", "/frozen", image_of(1e300), 400, "outside of 0 to 1"),
        ("POST", "/frozen", image_of(-0.5), 400, "outside of 0 to 1"),
        ("POST", "/frozen", json.dumps({"images": [[0] * 64] * 257}), 413, "at most 256"),
        ("POST", "/frozen", b" " * (1 << 20) + b"1", 413, "at most 1048576"),
    ],
)
def test_bad_requests_are_refused(port, method, path, body, status, reason):
    got, content = ask(port, method, path, body)
    assert got == status
    assert reason in content["error"]


def raw(port, sent):
    """Send bytes, close our side, and return the answer."""
    with socket.create_connection((HOST, port), timeout=TIMEOUT) as connection:
        with suppress(ConnectionError):  # answered before all was sent
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        return rest(connection)


def rest(connection):
    """Read until the other side has closed, even if it did not read all of our bytes."""
    got = b""
    connection.settimeout(TIMEOUT)
    with suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            got += part
    return got


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("", b"411"),
        ("Content-Length: -1\r\n", b"400"),
        ("Content-Length: many\r\n", b"400"),
        ("Content-Length: 99999999999999999999\r\n", b"413"),
        ("Content-Length: 100\r\n", b"400"),  # and then the client is gone
    ],
)
def test_wrong_content_lengths(port, header, status):
    got = raw(port, f"POST /frozen HTTP/1.0\r\n{header}\r\n{{".encode())
    assert got.split()[1] == status


@pytest.mark.parametrize(
    ("sent", "status", "reason"),
    [
        (b"GARBAGE\r\n\r\n", b"400", "Bad request syntax ('GARBAGE')"),
        (b"POST /frozen\r\n\r\n", b"400", "Bad HTTP/0.9 request type ('POST')"),
        (b"GET / HTTP/x\r\n\r\n", b"400", "Bad request version ('HTTP/x')"),
        (b"GET / HTTP/2.0\r\n\r\n", b"505", "Invalid HTTP version (2.0)"),
        (b"GET /\xff\x00 HTTP/1.0\r\n\r\n", b"404", "no /\xff\x00"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.0\r\n\r\n", b"414", "URI Too Long"),
        (b"PUT /frozen HTTP/1.0\r\n\r\n", b"501", "Unsupported method ('PUT')"),
        (b"GET / HTTP/1.0\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"431", "Too many headers"),
        (b"GET / HTTP/1.0\r\na: " + b"b" * 70_000 + b"\r\n\r\n", b"431", "Line too long"),
    ],
)
def test_non_http_requests_get_json(port, sent, status, reason):
    head, _, body = raw(port, sent).partition(b"\r\n\r\n")
    assert head.split()[1] == status
    assert b"Content-Type: application/json" in head
    ((key, said),) = json.loads(body).items()
    assert key == "error"
    assert reason in said


def test_a_head_request_gets_no_body(port):
    head, _, body = raw(port, b"HEAD / HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert head.split()[1] == b"501"
    assert body == b""


def drip(port, head, byte):
    """Send the head and then a byte every tenth of a second; return the answer at its arrival."""
    with socket.create_connection((HOST, port), timeout=0.1) as connection:
        connection.sendall(head)
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            with suppress(TimeoutError):
                return connection.recv(1 << 16) + rest(connection)
            with suppress(ConnectionError):  # closed, but its answer can still be read
                connection.sendall(byte)
        raise AssertionError(f"served for {TIMEOUT} s")


@pytest.mark.slow
def test_slow_clients_time_out():
    """Even if they keep sending, the time for the headers and for a whole request is limited."""
    code = f"""
import sys
sys.path.insert(0, {str(SERVE.parent)!r})
import serve
serve.SECONDS_FOR_HEADERS, serve.SECONDS_TO_SEND = 1.0, 2.0
sys.exit(serve.main(["--port", "0", "--steps", "20", "--workers", "1"]))
"""
    post = b"POST /frozen HTTP/1.0\r\nContent-Length: 100000\r\n"
    with service("-c", code) as (_, port):
        for head, byte, took in [
            (b"P", b"O", "the headers took more than 1 s"),
            (post + b"a: ", b"b", "the headers took more than 1 s"),
            (post + b"\r\n", b" ", "the request took more than 2 s"),
        ]:
            start = time.monotonic()
            got = drip(port, head, byte)
            assert time.monotonic() - start < 10
            assert got.split()[1] == b"408"
            assert json.loads(got.partition(b"\r\n\r\n")[2]) == {"error": took}
        # 100 MB are too many, and are not read for longer than a request may take.
        got = drip(port, post.replace(b"00000", b"00000000") + b"\r\n", b" ")
        assert got.split()[1] == b"413"
        assert ask(port, "GET", "/")[0] == 200


def workers_of(port, number, without=()):
    """The processes that answer, once there are `number` of them."""
    seen, deadline = set(), time.monotonic() + TIMEOUT
    while len(seen - set(without)) < number:
        assert time.monotonic() < deadline, f"only {seen} answered"
        seen.add(ask(port, "GET", "/")[1]["worker"])
    return seen


def has_ended(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # A zombie has also ended, if orphans are not reaped.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def assert_end(pids):
    deadline = time.monotonic() + TIMEOUT
    while not all(has_ended(pid) for pid in pids):
        assert time.monotonic() < deadline, f"of {pids} some still run"
        time.sleep(0.05)


def test_a_killed_worker_is_replaced():
    with service() as (process, port):
        workers, victims = workers_of(port, 2), []
        answer(port, "frozen", np.zeros((3, 64)))
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):
            victims.append(min(workers))
            os.kill(victims[-1], number)
            workers = workers_of(port, 2, without=victims) - set(victims)
            assert len(workers) == 2
        assert ask(port, "GET", "/drift")[1]["count"] == 3
        process.terminate()
        assert process.wait(TIMEOUT) == 0
        said = process.stderr.read()
        assert all(f"worker {pid} is gone; starting another" in said for pid in victims)
        assert_end([*victims, *workers])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_on_signal(number):
    with service() as (process, port):
        workers = workers_of(port, 2)
        process.send_signal(number)
        assert process.wait(TIMEOUT) == 0
        assert process.stderr.read() == ""
        assert_end(workers)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, port), timeout=TIMEOUT)


@pytest.mark.slow
def test_workers_end_with_their_parent():
    with service() as (process, port):
        workers = workers_of(port, 2)
        process.kill()
        process.wait(TIMEOUT)
        assert_end(workers)


@pytest.mark.slow
def test_silent_clients_do_not_block_others():
    """Other clients do not wait, and the end waits no longer than the time to send."""
    with service() as (process, port):
        silent = [socket.create_connection((HOST, port), timeout=TIMEOUT) for _ in range(20)]
        for connection in silent[10:]:
            connection.sendall(b"POST /frozen HTTP/1.0\r\nContent-Length: 10\r\n\r\n")
        workers = workers_of(port, 2)
        process.terminate()
        assert process.wait(TIMEOUT) == 0
        assert_end(workers)
        for connection in silent:
            connection.close()


@pytest.mark.slow
def test_threads_before_the_fork_do_not_hang_the_workers(images):
    """The parent has run in parallel, so the workers have OpenMP's record of dead threads."""
    code = f"""
import sys
sys.path.insert(0, {str(SERVE.parent)!r})
import bnfast, numpy as np, serve
from bnfast import _core
with bnfast.num_threads(2):
    bnfast.moments(np.ones((64, 64, 64, 32), np.float32))
assert _core.pool_started()
plain = serve.infer
def infer(network, images):
    with bnfast.num_threads(2):
        bnfast.moments(np.ones((64, 64, 64, 32), np.float32))
    return plain(network, images)
serve.infer = infer
sys.exit(serve.main(["--port", "0", "--steps", "20"]))
"""
    with service("-c", code) as (_, port):
        for _ in range(4):
            assert answer(port, "frozen", images).shape == (40, 10)


@pytest.mark.slow
def test_the_load_test_prints_its_table():
    command = [SERVE, "--load", "3", "--requests", "40", "--steps", "60"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = {line.split()[0]: [float(n) for n in line.split()[1:]] for line in lines[2:4]}
    for requests, per_second, *percentiles in (rows["frozen"], rows["folded"]):
        assert requests == 40
        assert per_second > 0
        assert percentiles == sorted(percentiles)
    assert "differ from those of the image alone: 0 of" in done.stdout
    assert done.stderr == ""
