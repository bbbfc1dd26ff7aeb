"""Shards: the Parquet format, reading and writing it, on disk and on S3."""
