"""``python -m bnfast`` prints what was built and what was chosen on this machine."""

from ._config import show_config

if __name__ == "__main__":
    show_config()
