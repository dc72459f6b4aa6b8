"""Checks, statistics and reports: what is claimed about a subnetwork, and on what evidence."""
