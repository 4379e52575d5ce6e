"""Slurm: handing a run over, what runs on each node, what is decided after it, and asking how it goes."""
