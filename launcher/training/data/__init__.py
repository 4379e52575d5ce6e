"""Training data: sources, preparation, packing, order, batches."""
