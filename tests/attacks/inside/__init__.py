"""What runs in the cells of `tests.attacks.cells`, to get out of them. Standard library only."""
