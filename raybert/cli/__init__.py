"""The command line: one table of commands, one file a group of them."""
