"""Ways into other frameworks, each imported by its framework only."""
