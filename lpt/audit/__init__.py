"""Likely label errors and near-duplicates among training images."""
