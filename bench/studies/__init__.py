"""Studies of one question each. None is part of `make bench`."""
