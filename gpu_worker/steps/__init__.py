"""Steps as a worker runs them: plans become batches, batches become tokens and vectors."""
