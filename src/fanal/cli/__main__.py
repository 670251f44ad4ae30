"""`python -m fanal.cli`, for launchers that start a module."""

from fanal.cli import main

if __name__ == "__main__":
    main()
