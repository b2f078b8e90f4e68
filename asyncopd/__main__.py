"""`python -m asyncopd`."""

from asyncopd.cli import main

if __name__ == "__main__":
    main()
