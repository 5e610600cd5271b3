"""The schedulers that a gateway is connected to: discovery, links, routing, failover and resumption."""
