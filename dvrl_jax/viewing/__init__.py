"""Playing, judging and drawing what was trained."""
