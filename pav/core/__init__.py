"""Under everything: errors, advantage maths, steps, run directories, progress, tables. No torch."""
