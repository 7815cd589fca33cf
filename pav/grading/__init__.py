"""Is an answer right? Numbers, LaTeX, and graders in a process with limits."""
