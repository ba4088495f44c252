"""The command line: one file a command, and one line for each in :data:`dpfix.cli.main.COMMANDS`."""
