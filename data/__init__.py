"""Make, fetch, check and load token shards. The trainer imports data/loader.py only."""
