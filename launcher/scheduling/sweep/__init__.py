"""Several runs of one job that differ in some keys, and which of them came out best."""
