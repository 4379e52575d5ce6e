"""Slurm: submitting a run, running on each node, deciding what follows, asking the queue."""
