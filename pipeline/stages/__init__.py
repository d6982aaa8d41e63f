"""Stages: functions from described inputs and an empty folder to a described artifact."""
