"""What clients may demand of outputs: grammars and schemas, tried out in a process with limits."""
