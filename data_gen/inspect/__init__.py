"""Looking at a label run: status, show, health, dashboard, card."""
