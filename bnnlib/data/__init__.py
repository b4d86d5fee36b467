"""Labelled images: the published sets, the drawn ones, your own arrays, data sets and files."""
