"""``python -m benchmarks``. Nothing is imported outside the guard: the child processes of `memory`
import this file again, and need neither a command line nor plots.
"""

if __name__ == "__main__":
    import sys

    from benchmarks.cli import main

    sys.exit(main())
