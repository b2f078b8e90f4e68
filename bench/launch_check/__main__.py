"""python -m bench.launch_check; a module of its own, which the processes that compile need not import."""

from bench.launch_check.check import main

if __name__ == "__main__":
    main()
