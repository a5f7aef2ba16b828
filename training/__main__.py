"""`python -m training`: see `training.cli`."""

from training import main

if __name__ == "__main__":
    main()
