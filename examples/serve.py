"""An inference service of forked processes: one network, its batch norms frozen or folded.

The paper's network (`paper.py`) learns scikit-learn's digits for some seconds. Then
processes forked from the trained one answer, each connection in its own thread. The
standard library's HTTP server is for demonstrations, not for the open internet.

    python examples/serve.py --port 8000             # until SIGTERM or Ctrl-C
    curl -d '{"images": [[0, 0, ...]]}' localhost:8000/folded
    python examples/serve.py --load 4                # latencies with 4 clients at a time

    POST /frozen or /folded   {"images": n rows of 64 numbers from 0 to 1}
    ->                        {"digits": [n], "logits": [[10], ...], "worker": process id}
    GET /drift                have the images moved from those of training?
    ->                        {"count": n, "seconds": since the start, "worst": [{"input": 27,
                               ...}, ...], "kl_divergence": [64], "mean_difference": [64]}
    DELETE /drift ->          the same, and starts again
    for a bad request ->      {"error": a sentence}

All workers' images count for /drift. A divergence is null if it is infinite: that pixel is
constant in training or in what was asked, as some are in the first few images.

A request may take ten seconds to arrive, even if its client keeps sending.

An image's answer is the same, to the bit, in any batch: the load test compares.
bnfast's layers ensure that, and so do the sigmoids. A product of matrices does not,
since the order of BLAS' additions depends on the number of rows.  So the products here
go row by row.
"""

from __future__ import annotations

import argparse
import copy
import http.client
import io
import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from digits import load_digits
from paper import Network, Run, train
from serve_drift import Watch

import bnfast

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from digits import Floats

HOST = "127.0.0.1"
PIXELS = 64
MOST_IMAGES = 256
MOST_BYTES = 1 << 20
MOST_DISCARDED = 1 << 24
SECONDS_FOR_HEADERS = 5.0  # for a client to send the headers, even if it keeps sending
SECONDS_TO_SEND = 10.0  # the same for a whole request, and again for reading its answer
SECONDS_TO_STOP = 25.0  # then remaining workers are killed; longer than an answer takes
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}


# -------------------------------------------------------------- the networks


def row_by_row(x: Floats, weight: Floats) -> Floats:
    """x @ weight, each row alone, so that no row depends on the others."""
    return np.stack([row @ weight for row in x])


class Service(NamedTuple):
    """What each worker has."""

    networks: dict[str, Network]
    watch: Watch


def trained_service(steps: int) -> Service:
    """Train, and keep what the training images were like."""
    return Service(trained_networks(steps), Watch(bnfast.moments(load_digits().train)))


def trained_networks(steps: int) -> dict[str, Network]:
    """Train one network and return it with its batch norms frozen and folded."""
    network = train(
        Run(normalized=True, rate=2.0, seed=0, steps=steps, std=0.1, watch=True)
    ).network
    assert network is not None
    networks = {"frozen": network.frozen(), "folded": network.folded()}
    for served in networks.values():
        served.product = row_by_row
    return networks


def infer(network: Network, images: Floats) -> Floats:
    """Return the logits, in any thread. Uses a copy, since a forward keeps data for a backward."""
    return copy.copy(network).forward(images)


# --------------------------------------------------------------- one request


class BadRequest(Exception):
    """A client's mistake: a status from 400 to 499 and a sentence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def parse(body: bytes) -> Floats:
    """Return a request's images, or refuse it."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(400, f"the body is not JSON: {error}") from error
    images = request.get("images") if isinstance(request, dict) else None
    if not isinstance(images, list) or not images:
        raise BadRequest(400, 'expected an object {"images": [...]} with an image or more')
    if len(images) > MOST_IMAGES:
        raise BadRequest(413, f"{len(images)} images; expected at most {MOST_IMAGES}")
    try:
        values = np.array(images)
    except (ValueError, RecursionError) as error:
        raise BadRequest(400, f"images are not rows of the same length: {error}") from error
    if values.dtype.kind not in "iuf" or values.shape[1:] != (PIXELS,):
        given = f"shape {values.shape} and type {values.dtype}"
        raise BadRequest(400, f"images of {given}; expected n rows of {PIXELS} numbers")
    if not np.all((values >= 0) & (values <= 1)):  # false for NaN too
        raise BadRequest(400, "an image has values outside of 0 to 1")
    return values.astype(np.float32)


class TimedReader(io.RawIOBase):
    """Reads from a connection until a deadline, which arriving bytes do not extend."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.start = time.monotonic()
        self.allow("the headers", SECONDS_FOR_HEADERS)

    def allow(self, what: str, seconds: float) -> None:
        """Name what is read next, and set its deadline, counted from the start."""
        self.what, self.seconds = what, seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.start + self.seconds - time.monotonic()
        if left > 0:
            self.connection.settimeout(left)
            with suppress(TimeoutError):
                return self.connection.recv_into(buffer)
        raise BadRequest(408, f"{self.what} took more than {self.seconds:g} s")


class Handler(BaseHTTPRequestHandler):
    """Answers one request, always in JSON, also for errors."""

    server: Server
    requestline = request_version = command = ""  # until the first line was read
    default_request_version = "HTTP/1.0"  # for a bad line: 0.9 would have no status

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.reader = TimedReader(self.connection)
        self.rfile = io.BufferedReader(self.reader)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except BadRequest as error:
            self.answer(error.status, {"error": str(error)})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Give errors of the base class the same form as all others."""
        self.answer(code, {"error": message or HTTPStatus(code).phrase})

    def do_GET(self) -> None:
        networks = self.server.service.networks
        if self.path == "/":
            self.answer(200, {"networks": sorted(networks), "worker": os.getpid()})
        elif self.path == "/drift":
            self.answer(200, self.server.service.watch.report())
        elif self.path[1:] in networks:
            self.answer(405, {"error": "expected POST"}, Allow="POST")
        else:
            self.answer(404, {"error": f"no {self.path}"})

    def do_POST(self) -> None:
        network, images = self.network(), parse(self.body())
        logits = infer(network, images)
        self.server.service.watch.add(images)
        digits = logits.argmax(axis=1).tolist()
        self.answer(200, {"digits": digits, "logits": logits.tolist(), "worker": os.getpid()})

    def do_DELETE(self) -> None:
        if self.path != "/drift":
            raise BadRequest(404, f"nothing to delete at {self.path}")
        self.answer(200, self.server.service.watch.report(forget=True))

    def network(self) -> Network:
        if self.path == "/drift":
            raise BadRequest(405, "expected GET or DELETE")
        if self.path[1:] not in self.server.service.networks:
            raise BadRequest(404, f"no {self.path}")
        return self.server.service.networks[self.path[1:]]

    def body(self) -> bytes:
        given = self.headers.get("Content-Length")
        if given is None:
            raise BadRequest(411, "expected a Content-Length")
        if not (given.isascii() and given.isdigit()):
            raise BadRequest(400, f"Content-Length is {given!r}; expected a number")
        self.reader.allow("the request", SECONDS_TO_SEND)
        if len(given) > 9 or int(given) > MOST_BYTES:
            if len(given) <= 9:
                self.discard(min(int(given), MOST_DISCARDED))
            raise BadRequest(413, f"{given} bytes; expected at most {MOST_BYTES}")
        body = self.rfile.read(int(given))
        if len(body) < int(given):
            raise BadRequest(400, f"{len(body)} bytes of a body of {given}")
        return body

    def discard(self, count: int) -> None:
        """Read what a client is still sending: if we closed now, it would never see its answer."""
        with suppress(BadRequest):
            while count > 0 and (got := len(self.rfile.read(min(count, 1 << 16)))):
                count -= got

    def answer(self, status: int, content: dict[str, Any], **headers: str) -> None:
        self.connection.settimeout(SECONDS_TO_SEND)
        self.close_connection = True
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Use stderr for errors only."""


# --------------------------------------------------- workers and their parent


class Server(ThreadingHTTPServer):
    """One worker's server, on the socket that all workers accept from."""

    daemon_threads = False  # closing waits for running answers
    block_on_close = True

    def __init__(self, listening: socket.socket, service: Service) -> None:
        super().__init__(listening.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.service = service
        self.parent = os.getppid()

    def service_actions(self) -> None:
        """Stop if the parent is gone, so that the port does not stay in use forever."""
        if os.getppid() != self.parent:
            self.stop()

    def stop(self, *_: object) -> None:
        # From another thread: this may be called by the loop that is to end.
        threading.Thread(target=self.shutdown, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that went away or fell silent; report other errors on stderr."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def work(listening: socket.socket, service: Service) -> None:
    """Answer until SIGTERM, then finish the running requests."""
    server = Server(listening, service)
    signal.signal(signal.SIGTERM, server.stop)
    # Ctrl-C reaches all processes; the parent passes it on
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    with server:
        server.serve_forever(poll_interval=0.1)


def fork_worker(listening: socket.socket, service: Service) -> int:
    # Python 3.12 and later warn if threads run at a fork. BLAS starts its own again, and
    # bnfast stays on one thread in a child forked after a parallel call.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work(listening, service)
        status = 0
    except BaseException:  # noqa: BLE001 - a child must never run on in the parent's program
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def serve(listening: socket.socket, service: Service, workers: int) -> int:
    """Keep `workers` processes answering until SIGTERM or SIGINT; return 0 if all then ended."""
    # A worker that loses the race for a connection must not wait in accept: it could not stop.
    listening.setblocking(False)
    # Blocked, and taken one by one, so that none is lost between a check and a wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # ignored by default, so it needs a handler
    running: set[int] = set()
    while True:
        while len(running) < workers:
            running.add(fork_worker(listening, service))
        if signal.sigwait(SIGNALS) != signal.SIGCHLD:
            break
        for pid in reaped(running):
            print(f"worker {pid} is gone; starting another", file=sys.stderr, flush=True)
            time.sleep(0.1)  # do not restart a failing worker all the time
    listening.close()
    return int(stop(running) > 0)


def stop(running: set[int]) -> int:
    """End all workers by SIGTERM; return how many had to be killed after some time."""
    for pid in running:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_STOP
    while running and time.monotonic() < deadline:
        if not reaped(running):
            time.sleep(0.02)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(running)


def reaped(running: set[int]) -> list[int]:
    """Remove the processes that ended from `running` and return them."""
    ended = [pid for pid in running if os.waitpid(pid, os.WNOHANG)[0]]
    running.difference_update(ended)
    return ended


def listen(port: int) -> socket.socket:
    return socket.create_server((HOST, port), backlog=128)


# ------------------------------------------------------------- the load test


@contextmanager
def running_service(service: Service, workers: int) -> Iterator[int]:
    """Serve in a separate process, on a free port; yield the port."""
    listening = listen(0)
    port = listening.getsockname()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = serve(listening, service, workers)
        finally:
            os._exit(status)
    listening.close()
    try:
        yield port
    finally:
        os.kill(pid, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise RuntimeError(f"the service ended with status {status}")


def ask(port: int, network: str, images: Floats) -> tuple[float, Floats]:
    """Send one request; return its seconds and the logits."""
    body = json.dumps({"images": images.tolist()})
    start = time.perf_counter()
    with closing(http.client.HTTPConnection(HOST, port, timeout=30)) as connection:
        connection.request("POST", f"/{network}", body)
        response = connection.getresponse()
        content = response.read()
    seconds = time.perf_counter() - start
    if response.status != 200:
        raise RuntimeError(f"{network} answered {response.status}: {content.decode()}")
    return seconds, np.array(json.loads(content)["logits"], np.float32)


def load_test(service: Service, workers: int, clients: int, requests: int) -> int:
    """Print a table of latencies; return how many answers were not the expected bits."""
    images, networks = load_digits().test, service.networks
    alone = {
        name: np.concatenate([infer(network, image[None]) for image in images])
        for name, network in networks.items()
    }
    rng = np.random.default_rng(0)
    batches = [rng.choice(len(images), rng.integers(1, 33)) for _ in range(requests)]
    wrong = 0
    rows = []
    with running_service(service, workers) as port, ThreadPoolExecutor(clients) as pool:
        for name in networks:
            start = time.perf_counter()
            answers = list(pool.map(lambda batch: ask(port, name, images[batch]), batches))  # noqa: B023
            total = time.perf_counter() - start
            rows.append((name, np.array([seconds for seconds, _ in answers]), total))
            for batch, (_, logits) in zip(batches, answers, strict=True):
                wrong += np.count_nonzero((logits != alone[name][batch]).any(axis=1))
    print(f"{clients} clients, {workers} workers, 1 to 32 images a request")
    print("network  requests  per second   p50 ms   p90 ms   p99 ms   max ms")
    for name, seconds, total in rows:
        p50, p90, p99, most = 1e3 * np.percentile(seconds, (50, 90, 99, 100))
        print(
            f"{name:7}{len(seconds):10}{len(seconds) / total:12.0f}"
            f"{p50:9.2f}{p90:9.2f}{p99:9.2f}{most:9.2f}"
        )
    sent = sum(len(batch) for batch in batches)
    print(f"answers that differ from those of the image alone: {wrong} of {len(rows) * sent}")
    print(f"the same with one product of matrices a batch: {by_matrix(networks, images, batches)}")
    return wrong


def by_matrix(networks: dict[str, Network], images: Floats, batches: Sequence[Any]) -> int:
    """Count the answers whose bits depend on their batch if BLAS multiplies it as a whole."""
    differing = 0
    for network in networks.values():
        plain = copy.copy(network)
        plain.product = np.matmul
        alone = np.concatenate([plain.forward(image[None]) for image in images])
        together = (plain.forward(images[batch]) != alone[batch] for batch in batches)
        differing += sum(np.count_nonzero(differs.any(axis=1)) for differs in together)
    return differing


# ------------------------------------------------------------------- command


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=8000, help="0 for a free one")
    parser.add_argument("--workers", type=positive, default=2, help="processes")
    parser.add_argument("--steps", type=positive, default=600, help="of training")
    parser.add_argument("--load", type=positive, metavar="CLIENTS", help="run the load test")
    parser.add_argument("--requests", type=positive, default=1000, help="of each load test")
    options = parser.parse_args(arguments)
    service = trained_service(options.steps)
    if options.load:
        return int(load_test(service, options.workers, options.load, options.requests) > 0)
    listening = listen(options.port)
    print(f"listening on {HOST}:{listening.getsockname()[1]}", flush=True)
    return serve(listening, service, options.workers)


if __name__ == "__main__":
    sys.exit(main())
