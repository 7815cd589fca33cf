"""``search.serve``: an OpenAI-compatible server in front of a search."""
