"""The scheduler's state machine: it plans steps, takes answers and ends requests."""
