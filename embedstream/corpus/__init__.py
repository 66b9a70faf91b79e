"""From one record to a row or a refusal, and from rows to blocks: what the producer and the Python client share."""
