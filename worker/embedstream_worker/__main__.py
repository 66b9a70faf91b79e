"""`python -m embedstream_worker`: the same as `embed-worker`."""

from embedstream_worker.cli import main

if __name__ == "__main__":
    main()
