"""What `fanal bench` runs: comparisons that reproduce the tables of the documentation from seeds."""
