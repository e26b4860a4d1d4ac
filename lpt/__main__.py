"""`python -m lpt` is `lpt`."""

from lpt.cli import main

if __name__ == "__main__":
    main()
