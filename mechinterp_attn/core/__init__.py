"""What every room stands on: results and their receipts, errors, progress, text and tables."""
