"""The gateway: the store for nodes without an etcd member, served by a voter's daemon."""
