"""``python -m redteam``."""

from redteam.cli import main

if __name__ == "__main__":
    main()
