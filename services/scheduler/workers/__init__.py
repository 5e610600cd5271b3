"""The hop to worker processes: their membership, liveness and socket."""
