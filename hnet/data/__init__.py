"""Bytes in: reading files and streams into documents, packing documents into batches."""
