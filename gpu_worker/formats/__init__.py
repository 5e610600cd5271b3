"""Files that models come in, read without torch."""
