"""The chain as a Prefect workflow: the only place that knows Prefect."""
