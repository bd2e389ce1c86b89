"""How the programs' batches are split over the ranks."""

# Rows of the batch on each of three ranks (with two ranks, the first also has the third's).
SPLITS = {"uneven": (5, 1, 3), "an empty rank": (4, 0, 5), "one rank only": (0, 9, 0)}
SHAPES = {"planar": (9, 5, 4, 3), "interleaved": (9, 5)}


def rows_of(split, rank, size):
    """The slice of the batch on a rank."""
    counts = list(SPLITS[split])
    if size == 2:
        counts = [counts[0] + counts[2], counts[1]]
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])
