"""Stream: batches for training in a planned order, with a ledger and a quarantine."""
