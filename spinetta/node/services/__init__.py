"""The gRPC services that every node offers. `server.serve` starts them."""
