"""What results are judged by: references, the exact belief, probes, tables. Nothing here is needed for training."""
