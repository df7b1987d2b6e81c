"""`python -m arkinfer`: the command line without an installed script."""

from arkinfer.cli import main

main()
