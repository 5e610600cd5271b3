"""From logits to a token: rules, draws, grammars and the vocabulary that they are about."""
