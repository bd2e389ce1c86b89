"""Population statistics of a model that clients train together: averaged, and merged.

Eight clients hold scikit-learn's digits, each mostly two or three digits of them, scanned with a
contrast of its own. In every round each trains the shared network on its own data, and the server
averages the weights (FedAvg). What remains is batch norm's running mean and variance:

    averaged     the server averages the clients' running variances, like weights
    momentum     a server with momentum, which treats them like weights, too (FedAvgM)
    merged       after the weights are averaged, each client sends the moments of its own
                 activations, a few numbers per channel, and the server merges them exactly

Averages lose the spread between the clients' means. Momentum moves beyond the average, and a
variance can become negative. Merged moments are those of all data in one place.

    python examples/federated.py               # some seconds
    python examples/federated.py --quick
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
from digits import Floats, Integers, load_digits

import bnfast

CLIENTS = 8
HIDDEN = 64
RATE = 0.2
SERVER_MOMENTUM = 0.9
STATISTICS = ("running_mean", "running_var")


class Client(NamedTuple):
    """Data of one client, which stay where they are."""

    x: Floats
    labels: Integers


class Network:
    """64 pixels, a hidden layer with batch norm and ReLU, ten digits."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.first = rng.normal(0, 0.1, (64, HIDDEN))
        self.norm = bnfast.BatchNorm(HIDDEN, activation="relu", dtype=np.float64)
        self.second = rng.normal(0, 0.1, (HIDDEN, 10))

    def hidden(self, x: Floats) -> Floats:
        """The batch norm's input."""
        return x @ self.first

    def logits(self, x: Floats) -> Floats:
        """Ten numbers for each image."""
        return self.norm(self.hidden(x)) @ self.second

    def step(self, x: Floats, labels: Integers) -> None:
        """Descend on the cross entropy of one batch."""
        self.norm.train()
        y = self.norm(self.hidden(x))
        logits = y @ self.second
        odds = np.exp(logits - logits.max(1, keepdims=True))
        error = odds / odds.sum(1, keepdims=True)
        error[np.arange(len(x)), labels] -= 1
        error /= len(x)
        self.norm.zero_grad()
        through = x.T @ self.norm.backward(error @ self.second.T)
        self.second -= RATE * (y.T @ error)
        self.first -= RATE * through
        self.norm.weight -= RATE * self.norm.weight_grad
        self.norm.bias -= RATE * self.norm.bias_grad

    def state(self) -> dict[str, Floats]:
        """Copies of all that is learned or counted."""
        own = {"first": self.first.copy(), "second": self.second.copy()}
        return own | {k: v for k, v in self.norm.state_dict().items() if v.ndim}

    def load(self, state: dict[str, Floats]) -> None:
        """Take another network's state."""
        self.first, self.second = state["first"].copy(), state["second"].copy()
        self.norm.load_state_dict({k: state[k] for k in state if k not in ("first", "second")})

    def accuracy(self, x: Floats, labels: Integers) -> float:
        """The share of digits that are recognised in evaluation."""
        self.norm.eval()
        with np.errstate(invalid="ignore"):
            return float((self.logits(x).argmax(1) == labels).mean())


def split(x: Floats, labels: Integers, seed: int) -> list[Client]:
    """Give each client mostly digits of its own, and a contrast of its own."""
    rng = np.random.default_rng(seed)
    order = np.argsort(labels + rng.normal(0, 0.5, len(labels)), kind="stable")
    sizes = np.cumsum(rng.dirichlet(np.full(CLIENTS, 4.0))[:-1]) * len(labels)
    parts = np.split(order, sizes.astype(int))
    return [
        Client(x[part] * rng.uniform(0.4, 1.6) + rng.uniform(0, 0.3), labels[part])
        for part in parts
    ]


def trained_by(client: Client, state: dict[str, Floats], steps: int, seed: int) -> dict:
    """What one client sends after a round."""
    rng = np.random.default_rng(seed)
    network = Network(0)
    network.load(state)
    for _ in range(steps):
        batch = rng.integers(0, len(client.x), 32)
        network.step(client.x[batch], client.labels[batch])
    return network.state()


def train(clients: list[Client], rounds: int, steps: int) -> tuple[dict, dict[str, dict]]:
    """Return the weights, and the statistics by each of the two averages."""
    share = np.array([len(client.x) for client in clients], float)
    share /= share.sum()
    state = Network(1).state()
    velocity = {name: np.zeros(HIDDEN) for name in STATISTICS}
    moved = {name: state[name].copy() for name in STATISTICS}
    for done in range(rounds):
        sent = [
            trained_by(client, state, steps, seed=100 * done + i)
            for i, client in enumerate(clients)
        ]
        state = {
            name: sum(s * part[name] for s, part in zip(share, sent, strict=True)) for name in state
        }
        for name in STATISTICS:
            velocity[name] = SERVER_MOMENTUM * velocity[name] + (state[name] - moved[name])
            moved[name] = moved[name] + velocity[name]
    return state, {"averaged": {name: state[name] for name in STATISTICS}, "momentum": moved}


def merged_statistics(network: Network, clients: list[Client]) -> bnfast.Moments:
    """What the server gets from moments: each client sends `to_dict()`, 2 x 64 + 1 numbers."""
    sent = [bnfast.moments(network.hidden(client.x)).to_dict() for client in clients]
    return bnfast.Moments.merge_all(map(bnfast.Moments.from_dict, sent))


def compare(rounds: int, steps: int) -> dict[str, tuple[float, float, float]]:
    """Return for each way the error of the variance, the least variance, and the accuracy."""
    data = load_digits()
    clients = split(data.train.astype(float), data.train_labels, seed=0)
    tests = split(data.test.astype(float), data.test_labels, seed=0)
    state, ways = train(clients, rounds, steps)
    network = Network(0)
    network.load(state)
    whole = bnfast.moments(network.hidden(np.concatenate([client.x for client in clients])))
    true = whole.var(ddof=1)
    rows = {}
    for way in (*ways, "merged"):
        if way == "merged":
            bnfast.load_statistics(network.norm, merged_statistics(network, clients))
        else:
            for name, values in ways[way].items():
                getattr(network.norm, name)[...] = values
        variance = network.norm.running_var
        error = np.abs(variance / true - 1).max()
        x = np.concatenate([client.x for client in tests])
        labels = np.concatenate([client.labels for client in tests])
        rows[way] = (float(error), float(variance.min()), network.accuracy(x, labels))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds")
    options = parser.parse_args(arguments)
    rounds = 4 if options.quick else 25
    rows = compare(rounds, steps=10)
    print(f"{CLIENTS} clients, {rounds} rounds of 10 steps; the variance of {HIDDEN} channels\n")
    print(f"{'statistics':12}{'largest error':>15}{'least variance':>16}{'test accuracy':>15}")
    for way, (error, least, accuracy) in rows.items():
        print(f"{way:12}{error:15.2g}{least:16.3g}{accuracy:15.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
