"""A request's way through the gateway: checked, prepared, submitted, its events gathered, its end recorded."""
