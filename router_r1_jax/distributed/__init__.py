"""Device mesh with its sharding rules, and runs of several processes (multi-host)."""
