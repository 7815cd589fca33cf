"""Speed: ratios that are measured side by side, in one process and run."""
