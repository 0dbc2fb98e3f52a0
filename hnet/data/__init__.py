"""Bytes in: reading files into documents, packing documents into batches."""
