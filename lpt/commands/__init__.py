"""The commands of `lpt`, by what they are for; `lpt.cli` puts them together."""
