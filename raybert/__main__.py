"""`python -m raybert`: the command line where no script is installed, as in a submitted job."""

from raybert.cli.entry import main

main()
