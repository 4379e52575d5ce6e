"""`launcher doctor`: what is wrong with this machine, or with the nodes of a cluster, and what to do about it."""
