"""The daemon: wiring, effects, gRPC services."""
