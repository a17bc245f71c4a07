"""Settings, the Spark session, logs, the console: what everything else stands on."""
