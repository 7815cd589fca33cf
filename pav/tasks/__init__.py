"""Tasks: the calculator tape (built in) and JSON lines files."""
