"""Decide single keys of a plan: batch, mesh, sharding, sample layout, ZeRO's buckets, Slurm's request."""
