"""Makes, fetches and checks token shards. The trainer imports nothing from here."""
