"""`python -m lddyn`: the command line, for launchers such as torchrun."""

from lddyn.cli.app import main

if __name__ == "__main__":
    main()
