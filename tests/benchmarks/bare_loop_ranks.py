"""A rank of bare_loop.py, in place of the trainer's own entry point."""

from launcher.training.entry import main
from tests.benchmarks.bare_loop import take_turns

if __name__ == "__main__":
    main(train=take_turns)
