"""`launcher doctor`: checks of this machine or of a cluster's nodes, with advice."""
