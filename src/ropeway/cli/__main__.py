"""`python -m ropeway.cli` is the command `ropeway`."""

from ropeway.cli.main import main

main()
