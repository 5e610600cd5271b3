"""What several services share: errors, configuration, logging, gRPC options."""
