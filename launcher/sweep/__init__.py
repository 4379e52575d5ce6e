"""Sweeps: several runs of one job that differ in some keys."""
