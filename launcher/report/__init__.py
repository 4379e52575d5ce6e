"""One page of HTML that tells of runs to those who were not there, made of their directories alone."""
