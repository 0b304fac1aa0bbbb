"""What measures: statistics with intervals, contact sheets."""
