"""`python -m gpuwatch` is the `gpuwatch` command."""

from gpuwatch.cli import main

if __name__ == "__main__":
    main()
