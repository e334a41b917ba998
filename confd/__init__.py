"""Renders configuration files from the datastore."""
