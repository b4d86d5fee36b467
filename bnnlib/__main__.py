"""`python -m bnnlib`: see `cli`."""

from bnnlib.cli import main

if __name__ == "__main__":
    main(prog_name="python -m bnnlib")
