"""`spinetta doctor`: what a machine lacks for a node, before and after it has joined."""
