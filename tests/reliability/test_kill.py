"""A run that is killed at bad moments ends as one that was not. `kill.py` does the same more often."""

from tests.reliability import kill


def test_killed_training_loses_nothing(tmp_path, capsys):
    counts = kill.torture(tmp_path, kills=2)
    assert counts["resumed from the newest checkpoint"] >= 1 and counts["arrays equal bit for bit"] > 50
