"""Self-contained HTML pages of results, and the figures on them."""
