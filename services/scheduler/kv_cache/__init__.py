"""The blocks of the KV cache and the events of the prefix cache. No sequence is known here."""
