"""`python -m drsync`: the command line."""

from drsync.cli import main

if __name__ == "__main__":
    main()
