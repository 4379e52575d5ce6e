"""Starting and supervising processes: on this machine, under Slurm, in sweeps; the doctor."""
