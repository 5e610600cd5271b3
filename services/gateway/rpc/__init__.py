"""The gRPC services of the gateway: each method turns a message into a call and its events into messages."""
