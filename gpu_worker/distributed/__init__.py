"""The ranks of a tensor-parallel group: how they meet, sum and follow rank 0."""
