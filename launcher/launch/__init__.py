"""Start and supervise processes: on this machine and under Slurm."""
