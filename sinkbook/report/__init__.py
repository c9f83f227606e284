"""What `sinkbook probe` says of a model: tables, a page that opens offline, explorers of heads."""
