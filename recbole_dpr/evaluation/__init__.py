"""The three tasks, their metrics, the methods compared, and the report."""
