"""Finding the settings of guidance: a probe that samples nothing, and a search that does."""
