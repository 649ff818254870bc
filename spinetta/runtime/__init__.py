"""What runs tasks: the shim, cgroups, and the ways to start a process."""
