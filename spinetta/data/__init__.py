"""Data near the tasks: caches, staging, store probes. Empty until data locality lands."""
