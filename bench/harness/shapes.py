"""The shapes to measure: ResNet-50 with a batch of 32, serving with 1, dense layers, tiny."""

from __future__ import annotations

Shape = tuple[int, ...]

RESNET50: list[Shape] = [
    (32, 64, 112, 112),
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 128, 28, 28),
    (32, 512, 28, 28),
    (32, 256, 14, 14),
    (32, 1024, 14, 14),
    (32, 512, 7, 7),
    (32, 2048, 7, 7),
]
SERVING: list[Shape] = [(1, 64, 56, 56), (1, 256, 14, 14)]
CONVOLUTIONS = RESNET50 + SERVING
DENSE: list[Shape] = [(60, 100), (128, 1024), (4096, 256)]
TINY: list[Shape] = [(1, 16, 4, 4)]
ALL = CONVOLUTIONS + DENSE + TINY
# One of each kind, and one that is larger than most caches.
QUICK: list[Shape] = [(32, 512, 28, 28), (32, 64, 28, 28), (32, 512, 7, 7), (128, 1024), *TINY]


def layouts(shape: Shape) -> tuple[str, ...]:
    return ("nchw", "nhwc") if len(shape) > 2 else ("dense",)


def in_layout(shape: Shape, layout: str) -> tuple[Shape, int]:
    """Return the shape in memory order, and its channel axis."""
    if layout == "nchw" or len(shape) == 2:
        return shape, 1
    n, c, *space = shape
    return (n, *space, c), -1


def label(shape: Shape) -> str:
    return "x".join(map(str, shape))


def parse(text: str) -> Shape:
    return tuple(int(size) for size in text.split("x"))
