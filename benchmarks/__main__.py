"""``python -m benchmarks``. Nothing is imported outside the guard: the child processes of `memory`
import this file again, and need neither a command line nor plots.
"""

if __name__ == "__main__":
    import sys

    try:
        from benchmarks.cli import main
    except ModuleNotFoundError as error:
        needs = 'the benchmarks need `pip install --no-build-isolation -e ".[bench]"`'
        sys.exit(f"{error}: {needs}")
    sys.exit(main())
