"""The shapes everything is measured on: ResNet-50 at batch 32, serving at batch 1, dense, tiny."""

RESNET50 = [
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
SERVING = [(1, 64, 56, 56), (1, 256, 14, 14)]
DENSE = [(60, 100), (128, 1024), (4096, 256)]
TINY = [(1, 16, 4, 4)]
ALL = RESNET50 + SERVING + DENSE + TINY


def in_layout(shape, layout):
    """The shape in memory and its channel axis: NCHW as it is, channels last turned."""
    if layout == "nchw" or len(shape) == 2:
        return shape, 1
    n, c, *space = shape
    return (n, *space, c), -1
