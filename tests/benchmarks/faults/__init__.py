"""Faults that are injected into real runs: see bench_fault_matrix.py and bench_soak.py."""
