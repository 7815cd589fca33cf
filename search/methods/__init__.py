"""The searches: async functions of one problem."""
