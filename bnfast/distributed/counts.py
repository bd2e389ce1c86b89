"""How many values per channel moments may have, to be sent as an int64."""

import numpy as np

MOST_VALUES = int(np.iinfo(np.int64).max)


def check_count(count: float) -> None:
    """Refuse a number of values that does not fit."""
    if count > MOST_VALUES:
        raise ValueError(f"moments.count is {count}; expected at most {MOST_VALUES}")
