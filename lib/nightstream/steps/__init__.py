"""The steps that jobs, streaming and the command line run; each is run(spark, settings, …)."""
