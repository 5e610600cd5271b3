"""What every process shows of itself: metrics and traces. Imports nothing of ours, and no torch."""
