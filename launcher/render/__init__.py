"""From a plan to the files that others read: DeepSpeed, Accelerate, torchrun, Slurm. Pure functions; nothing is started here."""
