"""The store of the cluster's truth: etcd, its client, its process and its membership."""
