"""From a path to a model that can run: weights, their parts for a rank, and packed copies on disk."""
