"""From tokens to what a client reads: text, stop strings, reasoning and tool calls."""
