"""The start and supervision of processes, on this machine and under Slurm."""
