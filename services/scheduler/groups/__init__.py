"""The state of each worker group: its sequences, blocks, steps in flight and step times."""
