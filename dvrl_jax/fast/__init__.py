"""The same numbers, sooner: each module here can be deleted, and every result stays the same."""
