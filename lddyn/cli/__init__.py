"""The command line: `lddyn COMMAND`."""
