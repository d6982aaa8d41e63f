"""The report: its data, its pictures, its page."""
