"""`python -m selectmoe`: the same as the command `selectmoe`."""

from selectmoe.cli.main import main

if __name__ == "__main__":
    main()
