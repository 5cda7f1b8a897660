"""Versions of what commands print as JSON; here, so that an error may be told before anything heavy is imported."""

INSPECTION = 1
