"""The order of sequences that wait: the queue, its policy, shares and quotas of tenants."""
