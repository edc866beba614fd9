"""Logs in, tables and pictures out; the trainer never imports this package."""
