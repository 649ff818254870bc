"""A cluster without a head node: any node takes tasks, idle nodes steal them."""

__version__ = "0.1.0"
