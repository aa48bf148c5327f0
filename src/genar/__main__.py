"""``python -m genar``: the command line where its script is not on the path."""

from genar.cli import main

if __name__ == "__main__":
    main()
