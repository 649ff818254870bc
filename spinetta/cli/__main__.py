"""``python -m spinetta.cli``."""

from spinetta.cli import main

if __name__ == "__main__":
    main()
