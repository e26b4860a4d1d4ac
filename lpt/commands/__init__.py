"""The commands, by what they are for: `lpt.cli` registers them. What a command needs is imported when it runs."""
