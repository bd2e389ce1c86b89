"""The program that is counted: bnfast's small calls, one after another."""

from bench.harness.small_calls import calls
from bench.instructions.valgrind import repeat

if __name__ == "__main__":
    for call in calls().values():
        repeat(call)
